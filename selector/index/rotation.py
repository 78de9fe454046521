"""Matryoshka order: rotate vectors so that their first dimensions carry most of every distance.

Principal axes, the widest first. A rotation changes no distance, and the distance over the leading dimensions is the best
linear stand-in for the whole: a search over a quarter of the bytes gives a shortlist, which is ranked again on the whole
vectors. Above `PCA_LIMIT` dimensions, where the axes would take minutes, the dimensions are only sorted by variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

PCA_LIMIT = 1024
"""Most dimensions for which principal axes are computed."""

MULTIPLE = 8
"""Rotated vectors are padded with zeros to a multiple of this, which vector units and product quantizers want."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthonormal change of axes, the widest first, padded with zero dimensions."""

    axes: Float32[np.ndarray, "D R"]
    """Columns are the new axes; the last ones are zero where R was padded."""
    energy: Float64[np.ndarray, " R"]
    """Share of the mean squared distance between two members that the first 1, 2, ... dimensions hold."""

    @classmethod
    def fit(cls, vectors: Float32[np.ndarray, "N D"]) -> Rotation:
        """Fit the axes on a pool, or on a random part of a large one.

        Args:
            vectors: the pool or its part.
        """
        count, dimensions = vectors.shape
        centered = vectors - vectors.mean(axis=0) if count else vectors
        if dimensions <= PCA_LIMIT:
            covariance = (centered.T @ centered).astype(np.float64)
            variances, axes = np.linalg.eigh(covariance)
        else:
            variances = np.einsum("nd,nd->d", centered, centered, dtype=np.float64)
            axes = np.eye(dimensions)
        order = np.argsort(-variances, kind="stable")
        width = -(-dimensions // MULTIPLE) * MULTIPLE
        padded = np.zeros((dimensions, width), dtype=np.float32)
        padded[:, :dimensions] = axes[:, order]
        sums = np.cumsum(np.maximum(variances[order], 0.0))
        energy = np.ones(width)
        if sums[-1] > 0:
            energy[:dimensions] = sums / sums[-1]
        return cls(padded, energy)

    def apply(self, vectors: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "N R"]:
        """Rotate vectors; distances stay.

        Args:
            vectors: in the original axes.
        """
        return vectors @ self.axes

    @property
    def quarter(self) -> int:
        """A quarter of the dimensions, rounded up to what the vector units want."""
        return -(-self.axes.shape[1] // (4 * MULTIPLE)) * MULTIPLE
