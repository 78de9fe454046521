"""A sampler whose weights change while the model trains.

Each batch is drawn from the whole selection with the weights of that moment, no sample twice in a batch. A set share of
every batch goes to the samples drawn longest ago whatever their weight, which bounds how long any sample can wait:

    every sample is drawn at least once in ceil(K / floor(coverage * batch_size)) batches.

Since these draws cannot be computed from the epoch alone, the checkpoint holds them: a resumed epoch replays its draws,
the ones that the data loader had fetched in advance among them, and continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped

from selector.errors import ConfigError
from selector.sampling.order import weighted_order
from selector.sampling.sampler import SelectionSampler
from selector.selection import Selection


@runtime_checkable
class Signal(Protocol):
    """What the weights of an adaptive sampler follow."""

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        ...

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] weights >= 0 for the next draw: the same on every rank."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures for the training log."""
        ...

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share, as plain values for JSON."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        ...


class AdaptiveSampler(SelectionSampler):
    """Draw batches of a selection with weights that follow a signal.

    Args:
        selection: what to draw from; its weights multiply those of the signal.
        signal: gives the weights; must see the same data on every rank.
        coverage: share of each batch for the samples drawn longest ago, 0 < coverage <= 1; at least one sample.
        options: as for `SelectionSampler`; strata and curricula are for orders that are known beforehand.

    Raises:
        ConfigError: the coverage is out of range.
    """

    def __init__(self, selection: Selection, signal: Signal, *, coverage: float = 0.25, **options: Any) -> None:
        if not 0 < coverage <= 1:
            raise ConfigError("coverage is a share of each batch", got=coverage, allowed="0 < coverage <= 1")
        if options.get("strata") is not None or options.get("curriculum") is not None:
            raise ConfigError(
                "weights that follow the training leave no room for strata or a curriculum",
                fix="use one of the two: a signal, or strata and curriculum",
            )
        super().__init__(selection, **options)
        self.signal = signal
        signal.bind(self.ids, self.scores)
        self._stalest = max(1, int(coverage * self._batch_size))
        self._lots = np.argsort(weighted_order(self._keys, seed=self._seed))
        self._last_drawn = np.full(len(self.ids), -1, dtype=np.int64)
        self._n_batches = 0
        self._epoch_of_blocks = 0
        self.identity |= {"coverage": coverage, "signal": type(signal).__name__}
        self.identity |= {f"signal.{name}": value for name, value in signal.identity().items()}

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] the weights that the next samples are drawn with, by position in `ids`."""
        return self._weights * self.signal.weights()

    def metrics(self, first: int, last: int) -> dict[str, float]:
        """Figures for the training log, the signal's among them."""
        return super().metrics(first, last) | self.signal.metrics()

    def _coverage(self, last: int) -> float:
        return float((self._last_drawn >= 0).mean())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Draws of the running epoch, age of every sample, and the state of the signal."""
        own = {
            "drawn": self.drawn(),
            "epoch": np.array(self._epoch_of_blocks),
            "last_drawn": self._last_drawn,
            "n_batches": np.array(self._n_batches),
        }
        return own | {f"signal.{name}": value for name, value in self.signal.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        self._blocks = [state["drawn"]]
        self._epoch_of_blocks = int(state["epoch"])
        self._last_drawn = state["last_drawn"].copy()
        self._n_batches = int(state["n_batches"])
        own = len("signal.")
        self.signal.load_state_dict({name[own:]: value for name, value in state.items() if name.startswith("signal.")})

    def _draws(self) -> Iterator[int]:
        if self._epoch_of_blocks != self._epoch:
            self._blocks, self._epoch_of_blocks = [], self._epoch
        yield from self.rows[self.drawn()].tolist()
        for batch in self._timed(self._new_batches()):
            self._blocks.append(batch)
            yield from self.rows[batch].tolist()

    def _new_batches(self) -> Iterator[Int[np.ndarray, " B"]]:
        while (left := self.n_draws - sum(map(len, self._blocks))) > 0:
            yield self._batch(min(self._batch_size, left))

    def _batch(self, size: int) -> Int[np.ndarray, " B"]:
        """Draw a batch: first samples that have waited longest, then samples by weight."""
        stalest = self._longest_waiting(min(self._stalest, size))
        weights = self.weights()
        weights[stalest] = 0
        order = weighted_order(self._keys, weights, seed=self._seed, epoch=self._n_batches, limit=size - len(stalest))
        batch = np.concatenate([stalest, order])
        self._last_drawn[batch] = self._n_batches
        self._n_batches += 1
        return batch

    def _longest_waiting(self, n: int) -> Int[np.ndarray, " n"]:
        """Positions of the n samples drawn longest ago; a lot that each sample keeps decides between equals."""
        waiting = self._last_drawn * len(self.ids) + self._lots
        return np.argpartition(waiting, n - 1)[:n]
