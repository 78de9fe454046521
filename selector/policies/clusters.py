"""k-means on vectors: Lloyd's iterations on a sample that is large enough, then one assignment of the whole pool."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

SAMPLES_PER_CLUSTER = 256
ITERATIONS = 20
BLOCK = 1 << 15


def k_means(vectors: Float[np.ndarray, "N D"], clusters: int, *, seed: int) -> Int[np.ndarray, " N"]:
    """Cluster of each vector.

    Args:
        vectors: float32.
        clusters: most clusters; fewer when there are fewer vectors or some stay empty.
        seed: chooses the training sample and the first centers.

    Returns:
        [N] int64, labels from 0.
    """
    rng = np.random.default_rng(seed)
    clusters = min(clusters, len(vectors))
    if clusters == 0:
        return np.zeros(0, dtype=np.int64)
    drawn = rng.permutation(len(vectors))[: clusters * SAMPLES_PER_CLUSTER]
    sample = np.asarray(vectors[drawn], dtype=np.float32)
    centers = sample[:clusters].copy()
    labels = np.full(len(sample), -1, dtype=np.int64)
    for _ in range(ITERATIONS):
        previous, labels = labels, nearest(sample, centers)
        if np.array_equal(previous, labels):
            break
        counts = np.bincount(labels, minlength=clusters)
        order = np.argsort(labels, kind="stable")
        filled = counts > 0
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        # an empty cluster keeps its center
        centers[filled] = np.add.reduceat(sample[order], starts[filled], axis=0) / counts[filled, None]
    return nearest(vectors, centers)


def nearest(vectors: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "C D"]) -> Int[np.ndarray, " N"]:
    """The center with the smallest Euclidean distance to each vector, the first among equals.

    Args:
        vectors: float32.
        centers: float32.
    """
    half_squares = (centers * centers).sum(axis=1) / 2
    blocks = [
        np.argmax(np.asarray(vectors[i : i + BLOCK], dtype=np.float32) @ centers.T - half_squares, axis=1)
        for i in range(0, len(vectors), BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
