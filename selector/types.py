"""The values that pass between rooms, and the legend of every shape.

N  samples      T  tokens of a sample (padded to the longest of its batch)
I  inputs of a linear layer      O  outputs of a linear layer
L  layers       P  projections of a layer       F  features (L x P layer specs)
R  length of a spectrum, min(T, I, O)           K  picked samples       D  dimensions of an index vector
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections of a decoder layer, in the order in which they are stored and shown."""

MEASURES = ("effective_rank", "nuclear_norm", "frobenius_norm", "spectral_norm")
"""The measures that a feature store keeps of every spectrum; stable rank is frobenius_norm² / spectral_norm²."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One weight matrix whose gradient is measured: one feature per measure."""

    name: str
    """Path of the module in the model, as `named_modules` gives it."""
    layer: int
    """Index of the decoder layer, from 0."""
    projection: str
    """Its role in the layer, one of `PROJECTIONS` or the module's own name."""
    in_features: int
    """Length of its input vectors."""
    out_features: int
    """Length of its output vectors; of the part alone where a fused layer is split."""

    @property
    def key(self) -> str:
        """Short unique name, such as `12.q`."""
        return f"{self.layer}.{self.projection}"

    @property
    def is_routed(self) -> bool:
        """Whether it stands for a layer's routed experts: many matrices of which a sample hits some."""
        return self.projection.startswith("expert_")


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per sample, with what is needed to spend a budget on it."""

    ids: np.ndarray
    """[N] str, unique."""
    rows: Int[np.ndarray, " N"]
    """Position of each sample in the data set that was scored."""
    values: Float[np.ndarray, " N"]
    """The score to select by, after length control and sign; higher is picked first; NaN where a sample has none."""
    raw: Float[np.ndarray, " N"]
    """The aggregated measure before length control, in its own unit."""
    n_tokens: Int[np.ndarray, " N"]
    """Tokens that a training step spends on the sample: prompt and completion."""
    n_loss_tokens: Int[np.ndarray, " N"]
    """Tokens that carry loss."""
    source: np.ndarray
    """[N] str, the data set or mixture component; the empty string where none is known."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the numbers come from: store fingerprint, measure, aggregation, control and its fit."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Picks:
    """What a policy returns: positions into the pool that it was given, best first."""

    positions: Int[np.ndarray, " K"]
    """Unique positions, 0 <= p < N."""
    reasons: np.ndarray
    """[K] str: why each one was picked, short enough for a table cell."""
    weights: Float[np.ndarray, " K"] | None = None
    """Sampling weights > 0, or None for equal weights."""
    removed: dict[str, int] = field(default_factory=dict)
    """How many samples each filter removed, by its name."""
