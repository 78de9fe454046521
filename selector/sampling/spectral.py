"""Weights from spectra of the current model, measured on samples as they are trained on.

Every measured sample keeps its latest value until it is drawn again. Values of one sample are means over the same layers
and projections, so that samples can be compared; a value grows with the number of loss tokens, which is taken out by a
line through log value over log tokens unless the raw measure is asked for. Samples that were not measured yet stand at
the rank that the selection's score gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from selector.errors import ConfigError
from selector.sampling.curricula import ranks_of

Control = Literal["length", "none"]


class SpectrumSignal:
    """Weights by the rank of a spectral measure of the current model's gradients.

        weight = rank ^ richness

    Args:
        measure: name of a spectral measure.
        control: `length` ranks by what the number of loss tokens does not explain; `none` by the measure itself.
        richness: exponent of the rank; negative prefers samples of low value.
        stride: measure one decoder layer in so many.
        share: measure so few layers, and if need be so few steps, that measuring takes this share of a step at most; None
            measures every step.
        projections: roles to measure.

    Attributes:
        layers: how many decoder layers are measured, evenly spaced; 0 until that is decided.
        every: measure one step in so many.
    """

    def __init__(
        self,
        *,
        measure: str = "effective_rank",
        control: Control = "length",
        richness: float = 1.0,
        stride: int = 1,
        share: float | None = 0.05,
        projections: tuple[str, ...] = ("q", "k", "v", "o"),
    ) -> None:
        if share is not None and not 0 < share < 1:
            raise ConfigError("share is a part of a step's time", got=share, allowed="0 < share < 1, or None")
        if stride < 1:
            raise ConfigError("stride counts layers", got=stride, allowed="1 or more")
        self.measure, self.control, self.richness = measure, control, richness
        self.stride, self.share, self.projections = stride, share, projections
        self.layers, self.every = 0, 1

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        self._prior = np.full(len(ids), 0.5) if np.isnan(scores).any() else ranks_of(scores)
        self.values = np.full(len(ids), np.nan)
        self._tokens = np.ones(len(ids), dtype=np.int64)
        self.measured_at = np.full(len(ids), -1, dtype=np.int64)
        self._ranks = self._prior

    def observe(
        self,
        positions: Int[np.ndarray, " M"],
        values: Float[np.ndarray, " M"],
        tokens: Int[np.ndarray, " M"],
        step: int,
    ) -> None:
        """Take measurements; where a sample comes twice, as several rollouts of a prompt do, their mean.

        Args:
            positions: [M] samples, as positions in the sampler's `ids`.
            values: [M] the measure; NaN where the gradient is zero, which leaves a sample's last value.
            tokens: [M] loss tokens.
            step: forward steps before this one.
        """
        finite = np.isfinite(values)
        samples, member = np.unique(positions[finite], return_inverse=True)
        counts = np.bincount(member, minlength=len(samples))
        self.values[samples] = np.bincount(member, weights=values[finite], minlength=len(samples)) / counts
        mean_tokens = np.bincount(member, weights=tokens[finite], minlength=len(samples)) / counts
        self._tokens[samples] = np.maximum(mean_tokens.round(), 1).astype(np.int64)
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

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return {
            "values": self.values, "tokens": self._tokens, "measured_at": self.measured_at,
            "layers": np.array(self.layers), "every": np.array(self.every),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        self.values, self._tokens = state["values"].copy(), state["tokens"].copy()
        self.measured_at = state["measured_at"].copy()
        self.layers, self.every = int(state["layers"]), int(state["every"])
        self._rank()

    def _rank(self) -> None:
        known = np.flatnonzero(~np.isnan(self.values))
        values = self.values[known]
        if self.control == "length" and len(known) > 2:
            tokens, logs = np.log(self._tokens[known]), np.log(np.maximum(values, np.finfo(float).tiny))
            spread = ((tokens - tokens.mean()) ** 2).sum()
            slope = ((tokens - tokens.mean()) * (logs - logs.mean())).sum() / spread if spread > 0 else 0.0
            values = logs - slope * tokens
        self._ranks = self._prior.copy()
        self._ranks[known] = ranks_of(values)
