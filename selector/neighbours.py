"""What a policy may ask about who lies near whom, without knowing how an index answers.

Answers are ragged: a query with fewer than k neighbours has a shorter list, never a filler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from selector.errors import GradientIndexError


@dataclass(frozen=True, eq=False)
class NeighbourLists:
    """Neighbours of Q queries as compressed sparse rows: query q owns the entries `indptr[q]:indptr[q + 1]`."""

    indptr: Int64[np.ndarray, " _"]
    """[Q + 1] where each query's entries begin, and the end of the last."""
    positions: Int64[np.ndarray, " E"]
    """Positions in the pool, 0 <= p < N; the nearest first within a query, ties by position."""
    similarities: Float32[np.ndarray, " E"]
    """Similarity of each entry to its query, higher is closer: the cosine, or minus the Euclidean distance."""

    def __post_init__(self) -> None:
        if not len(self.positions) == len(self.similarities) == (self.indptr[-1] if len(self.indptr) else -1):
            raise GradientIndexError(
                "neighbour lists are inconsistent",
                got=f"{len(self.positions)} positions, {len(self.similarities)} similarities, indptr {self.indptr[-1:]}",
                allowed="as many of each as the last entry of indptr says",
            )

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, query: int) -> tuple[Int64[np.ndarray, " K"], Float32[np.ndarray, " K"]]:
        """Positions and similarities of one query."""
        if not 0 <= query < len(self):
            raise IndexError(query)
        span = slice(int(self.indptr[query]), int(self.indptr[query + 1]))
        return self.positions[span], self.similarities[span]


@runtime_checkable
class Neighbours(Protocol):
    """A pool of N vectors that can be asked for similarity; positions count the pool's rows from 0."""

    def __len__(self) -> int:
        """N, the number of vectors in the pool."""
        ...

    def neighbours(self, positions: Int[np.ndarray, " Q"], k: int) -> NeighbourLists:
        """The up to k nearest others of some members of the pool; a member is never its own neighbour.

        Args:
            positions: [Q] int64, members of the pool.
            k: most neighbours per query.
        """
        ...

    def neighbours_of(self, vectors: Float[np.ndarray, "Q D"], k: int) -> NeighbourLists:
        """The up to k nearest members of some vectors.

        Args:
            vectors: [Q, D] float32, in the space of the pool before any normalization.
            k: most neighbours per query.
        """
        ...

    def graph(self, k: int) -> NeighbourLists:
        """The up to k nearest others of every member: a sparse graph with N rows.

        Args:
            k: most neighbours per member.
        """
        ...

    def duplicates(self, threshold: float) -> Int64[np.ndarray, " N"]:
        """Clusters of members that a chain of pairs with at least this similarity joins.

        Args:
            threshold: lowest similarity of a pair of near-duplicates.

        Returns:
            [N] int64: the smallest position in the cluster of each member, its own when it has no duplicate.
        """
        ...
