"""What a search engine has to offer, and the exact ranking that every engine's candidates go through.

An engine names candidates; their distances are then computed here, on the whole vectors, by one piece of arithmetic. So an
answer does not depend on the engine's rounding, on the batch it was asked in, or on what the engine compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64

Metric = Literal["cosine", "l2"]

BLOCK_BYTES = 2 << 20
"""Size of the temporary arrays in which candidates are ranked, within a core's cache."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Positions that an engine proposes: of row q, the first `counts[q]` entries are valid, the others hold 0."""

    positions: Int64[np.ndarray, "Q K"]
    """Positions in the pool, each at most once in a row."""
    counts: Int64[np.ndarray, " Q"]
    """How many of a row are valid."""


@runtime_checkable
class Backend(Protocol):
    """A search engine over the leading d dimensions of a pool, by Euclidean distance."""

    @property
    def name(self) -> str:
        """Engine and version, for descriptions."""
        ...

    def __len__(self) -> int:
        """Number of vectors."""
        ...

    def candidates(
        self, queries: Float32[np.ndarray, "Q d"], k: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> Candidates:
        """Propose the k members nearest to each query.

        Args:
            queries: contiguous rows.
            k: how many to propose; fewer come where fewer are found.
            allowed: which members may be proposed; all when None.
        """
        ...


def rank(
    queries: Float32[np.ndarray, "Q R"],
    vectors: Float32[np.ndarray, "N R"],
    candidates: Candidates,
    k: int,
    excluded: Int64[np.ndarray, " Q"] | None = None,
) -> tuple[Int64[np.ndarray, " Q+1"], Int64[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
    """Keep the k nearest candidates of each query, by distances over all dimensions; ties go to the lower position.

    Args:
        queries: query vectors.
        vectors: the pool.
        candidates: what an engine proposed.
        k: how many to keep.
        excluded: one member per query that must not be returned, such as the query itself.

    Returns:
        Bounds of each query's entries, positions, and squared distances.
    """
    vectors = np.asarray(vectors)  # a memory map answers slowly; its array does not
    width = candidates.positions.shape[1]
    step = max(1, BLOCK_BYTES // max(1, 4 * width * vectors.shape[1]))
    kept, found, counts = [], [], []
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        positions = candidates.positions[rows]
        difference = vectors[positions]
        difference -= queries[rows, None]
        squares = np.einsum("qkr,qkr->qk", difference, difference)
        squares[np.arange(width) >= candidates.counts[rows, None]] = np.inf
        if excluded is not None:
            squares[positions == excluded[rows, None]] = np.inf
        order = np.arange(len(squares))[:, None], np.lexsort((positions, squares), axis=1)[:, :k]
        squares = squares[order]
        valid = np.isfinite(squares)
        kept.append(positions[order][valid])
        found.append(squares[valid])
        counts.append(valid.sum(axis=1))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))])
    return (
        indptr.astype(np.int64),
        np.concatenate([np.zeros(0, np.int64), *kept]),
        np.concatenate([np.zeros(0, np.float32), *found]),
    )


def similarity(squares: Float32[np.ndarray, " E"], metric: Metric) -> Float32[np.ndarray, " E"]:
    """Similarity from squared distances: the cosine for vectors of length 1, or minus the distance.

    Args:
        squares: squared Euclidean distances.
        metric: `"cosine"` or `"l2"`.
    """
    return 1 - squares / 2 if metric == "cosine" else -np.sqrt(squares)


def radius(threshold: float, metric: Metric) -> float:
    """The Euclidean distance at which two members have a given similarity.

    Args:
        threshold: a cosine, or minus a distance.
        metric: `"cosine"` or `"l2"`.
    """
    return float(np.sqrt(2 * (1 - threshold))) if metric == "cosine" else -threshold
