"""From a matrix of features to one number per sample.

A measure of a sample is a number per layer and projection. They are averaged over the chosen part of the layer table,
by default as a geometric mean, because measures differ between layers by factors rather than by sums. Entries without a
gradient are left out of a sample's average; a sample without any entry has no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from selector.errors import ConfigError, SelectorError, raise_all
from selector.types import LayerSpec


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """Which features count, how much, and how they are averaged."""

    mean: str = "geometric"
    """Kind of average, `geometric` or `arithmetic`; `difference` is mean |m_l - m_(l+1)| of the layer profile m (arithmetic means)."""
    projections: tuple[str, ...] = ()
    """Which projections count; all when empty."""
    last: int | None = None
    """Only the last so many layers count; all when None."""
    depth: tuple[float, float] = (0.0, 1.0)
    """Band of relative depth that counts, first layer 0, last layer 1, both ends included."""
    weights: Mapping[str, int | float] = field(default_factory=dict)
    """Weight by projection (`"v"`) or by layer key (`"12.v"`, which wins); 1 where none is given."""
    scale: str = "none"
    """`unit`, `clip` or `none`: before averaging, divide each feature by its pool mean (unit), or cap it at its pool median (clip)."""

    def __post_init__(self) -> None:
        problems: list[SelectorError] = []
        low, high = self.depth
        if self.mean not in ("geometric", "arithmetic", "difference"):
            problems.append(ConfigError("unknown mean", got=self.mean, allowed="geometric, arithmetic, difference"))
        if self.scale not in ("none", "unit", "clip"):
            problems.append(ConfigError("unknown scale", got=self.scale, allowed="none, unit, clip"))
        if self.last is not None and self.last < 1:
            problems.append(ConfigError("last is too small", got=self.last, allowed="1 or more, or none"))
        if not 0 <= low <= high <= 1:
            problems.append(ConfigError("depth is no band", got=self.depth, allowed="0 <= low <= high <= 1"))
        if any(not np.isfinite(weight) or weight < 0 for weight in self.weights.values()):
            problems.append(ConfigError("weights must be finite and not negative", got=dict(self.weights)))
        raise_all(problems)

    def feature_weights(self, layers: Sequence[LayerSpec]) -> Float[np.ndarray, " F"]:
        """Weight of every entry of a layer table; zero for those that do not count.

        Args:
            layers: the layer table.

        Raises:
            ConfigError: a name is not in the table, or nothing is left.
        """
        projections = {spec.projection for spec in layers}
        known = projections | {spec.key for spec in layers}
        unknown = [name for name in (*self.projections, *self.weights) if name not in known]
        if unknown:
            raise ConfigError(
                "the store has no such projection or layer",
                got=", ".join(unknown),
                allowed=", ".join(sorted(projections)),
            )
        present = sorted({spec.layer for spec in layers})
        depth = {layer: i / max(len(present) - 1, 1) for i, layer in enumerate(present)}
        counted = set(present if self.last is None else present[-self.last :])
        low, high = self.depth
        weights = np.array(
            [
                float(self.weights.get(spec.key, self.weights.get(spec.projection, 1.0)))
                * (spec.layer in counted and low <= depth[spec.layer] <= high)
                * (not self.projections or spec.projection in self.projections)
                for spec in layers
            ]
        )
        if not weights.any():
            raise ConfigError(
                "no feature is left to average", got=self.describe(), fix="widen depth, last, projections or weights"
            )
        return weights

    def describe(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            **asdict(self),
            "weights": dict(self.weights),
            "depth": list(self.depth),
            "projections": list(self.projections),
        }


def feature_scale(features: Float[np.ndarray, "N F"], scale: str) -> Float[np.ndarray, " F"]:
    """Pool statistic of each feature by which `aggregate` scales: its mean for unit, its median for clip.

    Args:
        features: one measure of the whole pool, NaN where there is none.
        scale: `"unit"` or `"clip"`.

    Returns:
        [F] float64 > 0; 1 where no sample has the feature.
    """
    statistic = np.nanmean if scale == "unit" else np.nanmedian
    reference = np.ones(features.shape[1])
    present = np.isfinite(features).any(axis=0)
    reference[present] = statistic(features[:, present], axis=0)
    return np.where(reference > 0, reference, 1.0)


def aggregate(
    features: Float[np.ndarray, "N F"],
    layers: Sequence[LayerSpec],
    aggregation: Aggregation,
    reference: Float[np.ndarray, " F"] | None = None,
) -> Float[np.ndarray, " N"]:
    """Average features over layers and projections.

    Args:
        features: one measure, NaN where there is none; not negative.
        layers: the layer table, F entries.
        aggregation: what counts and how.
        reference: [F] the pool's `feature_scale`, needed unless `aggregation.scale` is none.

    Returns:
        [N] float64 in the unit of the measure (a ratio for unit); NaN for a sample without features.
    """
    weights = aggregation.feature_weights(layers)
    used = np.flatnonzero(weights)
    if len(used) < len(weights):
        features, weights = features[:, used], weights[used]
    if aggregation.scale != "none":
        if reference is None:
            raise ConfigError(
                f"scale {aggregation.scale} needs the pool's statistics", fix="pass the result of feature_scale"
            )
        limit = reference[used]
        features = features / limit if aggregation.scale == "unit" else np.minimum(features, limit)
    if aggregation.mean == "geometric":
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(features)
        return np.exp(_weighted_mean(logs, weights))
    if aggregation.mean == "arithmetic":
        return _weighted_mean(features, weights)
    owner = np.array([layers[f].layer for f in used.tolist()])
    groups = [owner == layer for layer in sorted(set(owner.tolist()))]
    profile = np.stack([_weighted_mean(features[:, group], weights[group]) for group in groups], axis=1)
    return _weighted_mean(np.abs(np.diff(profile, axis=1)), np.ones(profile.shape[1] - 1))


def _weighted_mean(values: Float[np.ndarray, "N F"], weights: Float[np.ndarray, " F"]) -> Float[np.ndarray, " N"]:
    """Mean over the finite entries of each row, summed in float64; NaN for a row without any."""
    if not weights.size:
        return np.full(len(values), np.nan)
    # not a matrix product: BLAS rounds a row differently by its place in the matrix, and equal samples must tie
    mean = (values * weights).sum(axis=1) / weights.sum()
    gaps = np.flatnonzero(~np.isfinite(mean))
    if len(gaps):
        present = np.isfinite(values[gaps])
        mass = present @ weights
        with np.errstate(invalid="ignore"):
            mean[gaps] = np.where(mass > 0, np.where(present, values[gaps], 0.0) @ weights / mass, np.nan)
    return mean
