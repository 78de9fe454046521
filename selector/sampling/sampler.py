"""A torch sampler that draws a selection: the same order on every rank and after every resume.

The order of an epoch is computed, never remembered (see `order`), so that a resumed run draws what the uninterrupted one
would have drawn. The price is that `set_epoch` must reach the sampler, which a resumed multi-process Accelerate loop only
does for a sampler installed by `DataLoader.set_sampler`; `selector.integrations.trl.attach` sees to it.

It is a plain `Sampler` and not a `RandomSampler`, which Accelerate would silently replace by its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch.utils.data import Sampler

from selector.errors import SelectionError
from selector.sampling.curricula import CURRICULA, ranks_of
from selector.sampling.order import BLOCK, Groups, deal, id_keys, weighted_order
from selector.selection import Selection

STAGES = 32
"""Stages of an epoch under a curriculum."""

SOURCES_SHOWN = 10
"""Where there are more sources, their shares are not logged."""

NO_REPEATS = Groups()


class SelectionSampler(Sampler[int]):
    """Yield the positions of a selection's samples, each once per epoch, in a new order every epoch.

    Args:
        selection: what to draw; its weights decide how early a sample tends to come.
        dataset_ids: [N] the sample id of each row of the data set that is loaded; None when that data set is the one that
            was scored, whose positions the selection knows.
        seed: of all orders, >= 0.
        curriculum: name of an entry of `CURRICULA`, which ranks samples by the selection's scores.
        strata: [K] a label for each sample of the selection, such as its source or its cluster of near-duplicates;
            every batch gets its share of each (see `order.deal`).
        batch_size: distinct samples of an optimizer step over all ranks; batches are dealt, and stages cut, by it.
        groups: how samples are repeated, for trainers that draw groups of completions.
        sources: [K] a label for each sample of the selection, whose shares are reported; the strata when None.

    Attributes:
        ids: [K] the samples that can be drawn, sorted; a position in here is what the other arrays are indexed by.
        missing: ids of the selection that the data set does not have; they are not drawn.
        seconds: time spent on drawing so far; reported, and never used to decide anything.

    Raises:
        SelectionError: the data set has none of the samples or names one twice, or a curriculum finds no scores.
        ConfigError: there is no such curriculum.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        dataset_ids: Sequence[str] | None = None,
        seed: int = 0,
        curriculum: str | None = None,
        strata: Shaped[np.ndarray, " K"] | None = None,
        batch_size: int = 1,
        groups: Groups = NO_REPEATS,
        sources: Shaped[np.ndarray, " K"] | None = None,
    ) -> None:
        rows, present = _rows_of(selection, dataset_ids)
        self.missing: tuple[str, ...] = tuple(selection.ids[~present].tolist())
        # Sorted by id, so that ties of the order fall to the lower id wherever the rows lie.
        kept = np.flatnonzero(present)
        kept = kept[np.argsort(selection.ids[kept].astype(str), kind="stable")]
        self.ids: np.ndarray = selection.ids[kept]
        self.scores: Float[np.ndarray, " K"] = selection.scores[kept]
        self.rows: Int[np.ndarray, " K"] = rows[kept]
        self._weights = selection.weights[kept]
        self._keys = id_keys(self.ids.tolist())
        self._strata = None if strata is None else np.asarray(strata)[kept]
        labels = self._strata if sources is None else np.asarray(sources)[kept]
        self._sources = None if labels is None else np.unique(labels, return_inverse=True)
        self._curriculum = None if curriculum is None else CURRICULA[curriculum]
        if curriculum is not None and np.isnan(self.scores).any():
            raise SelectionError(
                "a curriculum needs a score for every sample", got=f"{np.isnan(self.scores).sum()} without a score",
                fix="select by a score, or train without a curriculum",
            )  # fmt: skip
        self._seed, self._batch_size, self.groups = seed, batch_size, groups
        self.seconds = 0.0
        self._epoch = 0
        self._blocks: list[Int[np.ndarray, " B"]] = []
        self.identity: dict[str, Any] = {
            "samples": _digest(self._keys), "weights": _digest(self._weights), "seed": seed, "curriculum": curriculum,
            "strata": None if self._strata is None else _digest(np.unique(self._strata, return_inverse=True)[1]),
            "batch_size": batch_size, "groups": [groups.mini_repeat_count, groups.batch_size, groups.repeat_count],
        }  # fmt: skip

    @property
    def n_draws(self) -> int:
        """Samples drawn in an epoch, repeats not counted."""
        return len(self.ids) // self.groups.batch_size * self.groups.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; calling it again with the same epoch changes nothing."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.groups.length(len(self.ids))

    def __iter__(self) -> Iterator[int]:
        return self.groups.repeat(self._draws())

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] the weights that the next samples are drawn with, by position in `ids`."""
        return self._weights

    def drawn(self) -> Int[np.ndarray, " M"]:
        """[M] positions drawn so far in this epoch, in order, including those that the data loader holds in advance."""
        return np.concatenate([np.empty(0, np.int64), *self._blocks])

    def metrics(self, first: int, last: int) -> dict[str, float]:
        """Figures for the training log.

        Args:
            first: draws of this epoch that were reported before.
            last: draws of this epoch that have been trained on.

        Returns:
            `effective_samples` (Kish: how many equally weighted samples the weights amount to), `coverage` (share of the
            samples that have come up in this run), `mean_score` of the newly trained samples, and `share/LABEL` of each
            of up to ten sources among them.
        """
        new = self.drawn()[first:last]
        weights = self.weights()
        figures = {
            "effective_samples": float(weights.sum() ** 2 / (weights**2).sum()),
            "coverage": self._coverage(last),
            "mean_score": float(self.scores[new].mean()) if len(new) else float("nan"),
        }
        if len(new) and self._sources is not None and len(self._sources[0]) <= SOURCES_SHOWN:
            labels, numbers = self._sources
            shares = np.bincount(numbers[new], minlength=len(labels)) / len(new)
            figures |= {f"share/{label}": float(share) for label, share in zip(labels, shares, strict=True)}
        return figures

    def _coverage(self, last: int) -> float:
        return 1.0 if self._epoch else last / max(len(self.ids), 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold besides `identity`: nothing, since every order is computed."""
        return {}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""

    def _draws(self) -> Iterator[int]:
        self._blocks = []
        for block in self._timed(self._order(self._epoch)):
            for start in range(0, len(block), BLOCK):  # Python integers take four times the memory
                self._blocks.append(block[start : start + BLOCK])
                yield from self.rows[self._blocks[-1]].tolist()

    def _order(self, epoch: int) -> Iterator[Int[np.ndarray, " B"]]:
        """Positions of an epoch, stage by stage."""
        if self._curriculum is None:
            yield self._dealt(weighted_order(self._keys, self._weights, seed=self._seed, epoch=epoch))
            return
        ranks = ranks_of(self.scores)
        left = np.arange(len(self.ids))
        size = -(-len(left) // (STAGES * self._batch_size)) * self._batch_size
        for stage, start in enumerate(range(0, len(self.ids), size)):
            weights = self._weights[left] * self._curriculum(ranks, start / len(self.ids))[left]
            order = weighted_order(self._keys[left], weights, seed=self._seed, epoch=epoch, draw=stage, limit=size)
            yield self._dealt(left[order])
            left = np.delete(left, order)

    def _timed(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks, with the time that they take added to `seconds`."""
        while True:
            began = time.perf_counter()
            block = next(blocks, None)
            self.seconds += time.perf_counter() - began
            if block is None:
                return
            yield block

    def _dealt(self, order: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        return order if self._strata is None else deal(order, self._strata[order], self._batch_size)


def _rows_of(selection: Selection, dataset_ids: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """The row of each sample of the selection, and whether the data set has it."""
    if dataset_ids is None:
        return selection.rows, np.ones(len(selection), dtype=bool)
    position = {sample_id: row for row, sample_id in enumerate(dataset_ids)}
    if len(position) < len(dataset_ids):
        raise SelectionError(
            "the data set names a sample twice", got=f"{len(dataset_ids)} rows, {len(position)} ids",
            allowed="unique ids", fix="remove the duplicates, or name another id column",
        )  # fmt: skip
    present = np.array([sample_id in position for sample_id in selection.ids], dtype=bool)
    if not present.any():
        raise SelectionError(
            "the data set has no sample of the selection", got=f"ids such as {next(iter(position), None)!r}",
            allowed=f"ids such as {str(selection.ids[0]) if len(selection) else None!r}",
            fix="train on the data set that was scored, or name the column that holds its sample ids",
        )  # fmt: skip
    return np.array([position.get(sample_id, 0) for sample_id in selection.ids], dtype=np.int64), present


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
