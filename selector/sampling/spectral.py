"""Weights from spectra of the current model, measured while it trains.

Where the measurements come from is the one difference between the signals here: `TapSignal` takes them from the trainer's
own backward pass, of the samples that are being trained on; `RefreshSignal` has a part of the pool scored again now and
then. Every sample keeps its latest value until it is measured again. Values are means over the same layers and
projections, so that samples can be compared; a value grows with the number of loss tokens, which is taken out by a line
through log value over log tokens unless the raw measure is asked for. Samples that were not measured yet stand at the rank
that the selection's score gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from selector.errors import ConfigError, raise_all
from selector.sampling.curricula import ranks_of
from selector.spectra import measures
from selector.types import MEASURES

Control = Literal["length", "none"]


class SpectrumSignal:
    """Weights by the rank of a spectral measure of the current model's gradients.

        weight = rank ^ richness

    Args:
        measure: name of a spectral measure.
        control: `length` ranks by what the number of loss tokens does not explain; `none` by the measure itself.
        richness: exponent of the rank; negative prefers samples of low value.
        stride: measure one decoder layer in so many.
        projections: roles to measure.
    """

    def __init__(
        self,
        *,
        measure: str = "effective_rank",
        control: Control = "length",
        richness: float = 1.0,
        stride: int = 1,
        projections: tuple[str, ...] = ("q", "k", "v", "o"),
    ) -> None:
        if stride < 1:
            raise ConfigError("stride counts layers", got=stride, allowed="1 or more")
        _ = measures[measure]  # raises where there is none
        self.measure, self.control, self.richness = measure, control, richness
        self.stride, self.projections = stride, projections

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        self._prior = np.full(len(ids), 0.5) if np.isnan(scores).any() else ranks_of(scores)
        self.values = np.full(len(ids), np.nan)
        self._tokens = np.ones(len(ids))
        self._count, self._visit = np.zeros(len(ids), dtype=np.int64), np.full(len(ids), -1, dtype=np.int64)
        self.measured_at = np.full(len(ids), -1, dtype=np.int64)
        self._ranks = self._prior

    def observe(
        self,
        positions: Int[np.ndarray, " M"],
        values: Float[np.ndarray, " M"],
        tokens: Int[np.ndarray, " M"],
        step: int,
        visit: int | None = None,
    ) -> None:
        """Take measurements; those of one sample in one visit are averaged, as of the rollouts of a prompt.

        Args:
            positions: [M] samples, as positions in the sampler's `ids`.
            values: [M] the measure; NaN where the gradient is zero, which leaves a sample's last value.
            tokens: [M] loss tokens.
            step: forward steps before this one.
            visit: number of the visit, never falling, for visits that take several calls; each call is one when None.
        """
        finite = np.isfinite(values)
        samples, member = np.unique(positions[finite], return_inverse=True)
        counts = np.bincount(member, minlength=len(samples))
        earlier = np.where(self._visit[samples] == visit, self._count[samples], 0) if visit is not None else 0 * counts
        sums, token_sums = (
            np.bincount(member, weights=new[finite], minlength=len(samples)).astype(float) for new in (values, tokens)
        )
        sums += np.where(earlier, earlier * self.values[samples], 0.0)
        token_sums += earlier * self._tokens[samples]
        self._count[samples] = counts + earlier
        self._visit[samples] = -1 if visit is None else visit
        self.values[samples] = sums / self._count[samples]
        self._tokens[samples] = token_sums / self._count[samples]
        self.measured_at[samples] = step
        self._rank()

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] weights for the next draw."""
        return self._ranks**self.richness

    def metrics(self) -> dict[str, float]:
        """Figures for the training log."""
        known = ~np.isnan(self.values)
        return {
            f"live_{self.measure}": float(self.values[known].mean()) if known.any() else float("nan"),
            "measured": float(known.mean()),
        }

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        return {
            "measure": self.measure, "control": self.control, "richness": self.richness, "stride": self.stride,
            "projections": list(self.projections),
        }  # fmt: skip

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return {
            "values": self.values, "tokens": self._tokens, "measured_at": self.measured_at, "count": self._count,
            "visit": self._visit,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        self.values, self._tokens = state["values"].copy(), state["tokens"].copy()
        self.measured_at = state["measured_at"].copy()
        self._count, self._visit = state["count"].copy(), state["visit"].copy()
        self._rank()

    def _rank(self) -> None:
        known = np.flatnonzero(~np.isnan(self.values))
        values = self.values[known]
        if self.control == "length" and len(known) > 2:
            tokens, logs = np.log(np.maximum(self._tokens[known], 1)), np.log(np.maximum(values, np.finfo(float).tiny))
            spread = ((tokens - tokens.mean()) ** 2).sum()
            slope = ((tokens - tokens.mean()) * (logs - logs.mean())).sum() / spread if spread > 0 else 0.0
            values = logs - slope * tokens
        self._ranks = self._prior.copy()
        self._ranks[known] = ranks_of(values)


class TapSignal(SpectrumSignal):
    """Weights by spectra that the trainer's own backward pass gives of the samples it trains on.

    Args:
        share: measure so few layers, and if need be so few steps, that measuring takes this share of a step at most; None
            measures every step.
        options: as for `SpectrumSignal`.

    Attributes:
        layers: how many decoder layers are measured, evenly spaced; 0 until that is decided.
        every: measure one step in so many.
    """

    def __init__(self, *, share: float | None = 0.05, **options: Any) -> None:
        super().__init__(**options)
        if share is not None and not 0 < share < 1:
            raise ConfigError("share is a part of a step's time", got=share, allowed="0 < share < 1, or None")
        self.share = share
        self.layers, self.every = 0, 1

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        return super().identity() | {"share": self.share}

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return super().state_dict() | {"layers": np.array(self.layers), "every": np.array(self.every)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state)
        self.layers, self.every = int(state["layers"]), int(state["every"])


class RefreshSignal(SpectrumSignal):
    """Weights by spectra of a part of the pool that is scored again, with the current weights, every so many steps.

    Of K samples, M = ceil(pool_share * K) are scored each time, which takes about as long as M / batch size training
    steps. Half of them, rounded up, are those scored longest ago: **every sample is scored again at least once in
    ceil(K / ceil(M / 2)) refreshes**. The others are the most likely to be drawn, by weight times steps since their last.

    Args:
        every: optimizer steps from one refresh to the next.
        pool_share: part of the samples that can be drawn to score again each time.
        options: as for `SpectrumSignal`.

    Attributes:
        tried_at: [K] forward steps before each sample's last refresh, whether or not it gave a value; -1 for none.
    """

    def __init__(self, *, every: int = 50, pool_share: float = 0.02, **options: Any) -> None:
        super().__init__(**options)
        problems = [
            ConfigError("every counts optimizer steps", got=every, allowed="1 or more") if every < 1 else None,
            ConfigError("pool_share is a part of the pool", got=pool_share, allowed="0 < pool_share <= 1")
            if not 0 < pool_share <= 1
            else None,
            ConfigError("a refresh gives other measures", got=self.measure, allowed=", ".join(MEASURES))
            if self.measure not in MEASURES
            else None,
        ]
        raise_all([problem for problem in problems if problem])
        self.every, self.pool_share = every, pool_share

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        super().bind(ids, scores)
        self.tried_at = np.full(len(ids), -1, dtype=np.int64)

    def due(self, weights: Float[np.ndarray, " K"], step: int) -> Int[np.ndarray, " M"]:
        """Positions of the samples to score now; a function of the weights and of earlier refreshes alone.

        Args:
            weights: [K] that the next samples are drawn with.
            step: forward steps so far.
        """
        n = len(weights)
        count = math.ceil(self.pool_share * n)
        urgency = weights * (step - self.tried_at)
        stalest = np.lexsort((np.arange(n), -urgency, self.tried_at))[: -(-count // 2)]
        urgency[stalest] = -1.0
        likely = np.lexsort((np.arange(n), -urgency))[: count - len(stalest)]
        return np.concatenate([stalest, likely])

    def refreshed(
        self,
        due: Int[np.ndarray, " M"],
        values: Float[np.ndarray, " M"],
        tokens: Int[np.ndarray, " M"],
        step: int,
    ) -> None:
        """Take the scores of a refresh.

        Args:
            due: [M] what `due` returned.
            values: [M] the measure of each; NaN where there is none.
            tokens: [M] loss tokens of each.
            step: forward steps so far.
        """
        self.tried_at[due] = step
        self.observe(due, values, tokens, step)

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        return super().identity() | {"every": self.every, "pool_share": self.pool_share}

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return super().state_dict() | {"tried_at": self.tried_at}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state)
        self.tried_at = state["tried_at"].copy()


def evenly_spaced(layers: Sequence[int], count: int) -> list[int]:
    """So many of the layers, from all depths.

    Args:
        layers: indices of the decoder layers, rising.
        count: how many to take, 1 <= count <= len(layers).
    """
    return [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]
