"""From spectral features to vectors that can be compared: logarithm, standardization, one fit for all that follows.

Measures span decades (a norm of the first layer is not one of the last), so each feature is taken as the logarithm of a
measure of one layer and projection, centered and scaled over the pool that was indexed first. Vectors added later, and
queries, go through the same fit. A missing entry takes the center, which says "ordinary here" and moves no distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32

from selector.errors import GradientIndexError
from selector.store.reader import FeatureStore
from selector.types import MEASURES

Method = Literal["z", "robust"]

MAD_TO_SIGMA = 1.4826
"""Ratio of the standard deviation to the median absolute deviation of normal values."""


@dataclass(frozen=True, eq=False)
class Standardization:
    """Center and scale of every feature, fitted once and kept with the index."""

    measures: tuple[str, ...]
    """Measures that a vector holds, in order."""
    layers: tuple[str, ...]
    """Keys of the layer table: the features of one measure, in order."""
    center: Float32[np.ndarray, " D"]
    """Mean or median of each feature's logarithm."""
    scale: Float32[np.ndarray, " D"]
    """Standard deviation of each feature's logarithm, or its robust estimate; infinite for a constant feature."""
    missing: int
    """Entries of the fitted pool that were missing and took the center."""

    @classmethod
    def fit(
        cls, features: Mapping[str, Float[np.ndarray, "N F"]], layers: Sequence[str], method: Method = "z"
    ) -> Standardization:
        """Fit center and scale on a pool.

        Args:
            features: for each measure [N, F], positive; NaN where a layer got no gradient.
            layers: [F] keys of the layer table.
            method: mean and standard deviation (`"z"`), or median and median absolute deviation (`"robust"`).
        """
        logs = _logarithms(features, tuple(features))
        missing = np.isnan(logs)
        known = np.ma.masked_array(logs, missing)
        center = known.mean(axis=0, dtype=np.float64) if method == "z" else np.ma.median(known, axis=0)
        spread = known.std(axis=0, dtype=np.float64)
        if method == "robust":
            deviation = MAD_TO_SIGMA * np.ma.median(np.ma.abs(known - center), axis=0)
            spread = np.ma.where(deviation > 0, deviation, spread)
        center, spread = np.ma.filled(center, 0.0), np.ma.filled(spread, 0.0)
        noise = 1e-6 * np.maximum(np.abs(center), 1.0)
        scale = np.where(spread > noise, spread, np.inf)
        return cls(
            tuple(features), tuple(layers), center.astype(np.float32), scale.astype(np.float32), int(missing.sum())
        )

    def apply(self, features: Mapping[str, Float[np.ndarray, "N F"]]) -> Float32[np.ndarray, "N D"]:
        """Vectors of samples: every feature in standard deviations from the center of the fitted pool.

        Args:
            features: for each measure [N, F], with the layer table of the fit.

        Returns:
            [N, D] float32, D = measures x F, without NaN.

        Raises:
            GradientIndexError: a measure is missing, or has another number of layers.
        """
        lacking = [name for name in self.measures if name not in features]
        widths = {name: features[name].shape[1] for name in self.measures if name in features}
        if lacking or set(widths.values()) != {len(self.layers)}:
            raise GradientIndexError(
                "the features do not fit the index", got=f"features per measure: {widths}",
                allowed=f"{', '.join(self.measures)} with {len(self.layers)} layers each",
                fix="score with the model and layers of the indexed store",
            )  # fmt: skip
        logs = _logarithms(features, self.measures)
        logs -= self.center
        logs /= self.scale
        return np.nan_to_num(logs, copy=False, nan=0.0)


def _logarithms(
    features: Mapping[str, Float[np.ndarray, "N F"]], measures: Sequence[str]
) -> Float32[np.ndarray, "N D"]:
    raw = np.concatenate([np.asarray(features[name], dtype=np.float32) for name in measures], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(raw, out=raw)
    logs[~np.isfinite(logs)] = np.nan
    return logs


def read_features(
    store: FeatureStore, measures: Sequence[str] = MEASURES
) -> tuple[np.ndarray, dict[str, Float32[np.ndarray, "N F"]], dict[str, np.ndarray]]:
    """Read what an index takes from a store: the samples that have a score.

    Args:
        store: an open feature store.
        measures: which measures to read.

    Returns:
        Ids [N], features [N, F] by measure, and metadata columns [N] by name (row, source, n_tokens, n_loss_tokens, loss).
    """
    columns = ["row", "source", "n_tokens", "n_loss_tokens", "loss"]
    table = store.to_arrow(["sample_id", "status", *columns])
    scored = pc.equal(table["status"], "ok").to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    features = {name: store.features(name)[scored] for name in measures}
    metadata = {name: table[name].to_numpy()[scored] for name in columns}
    return table["sample_id"].to_numpy()[scored], features, metadata


def check_vectors(
    vectors: np.ndarray, ids: Sequence[str] | pa.ChunkedArray | None, *, metric: str, dimensions: int | None = None
) -> np.ndarray:
    """Make sure that vectors can be compared, and bring them to the length that the metric asks for.

    Args:
        vectors: [N, D], any float type.
        ids: [N] names for messages; positions when None.
        metric: `"cosine"` (vectors are scaled to length 1) or `"l2"` (kept).
        dimensions: D that is asked for; any when None.

    Returns:
        [N, D] float32.

    Raises:
        GradientIndexError: wrong shape, values that are not finite, or vectors without direction under cosine.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or (dimensions is not None and vectors.shape[1] != dimensions):
        raise GradientIndexError("vectors have the wrong shape", got=vectors.shape, allowed=f"[N, {dimensions or 'D'}]")
    if vectors.dtype.kind not in "fiu":
        raise GradientIndexError("vectors hold no numbers", got=vectors.dtype, allowed="floats")
    vectors = vectors.astype(np.float32)
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    bad = ~np.isfinite(squares) | ((squares == 0) if metric == "cosine" else False)
    if bad.any():
        first = np.flatnonzero(bad)[:5].tolist()
        raise GradientIndexError(
            f"{int(bad.sum())} vectors cannot be compared", got=", ".join(str(ids[i] if ids is not None else i) for i in first),
            allowed="finite values" + (", not all zero" if metric == "cosine" else ""),
            fix="leave these samples out" + (", or use metric='l2'" if metric == "cosine" else ""),
        )  # fmt: skip
    if metric == "cosine":
        vectors /= np.sqrt(squares)[:, None].astype(np.float32)
    return vectors
