"""A part of a pool that can be asked for neighbours: positions are translated, outsiders left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, Int64

from selector.neighbours import NeighbourLists, Neighbours


@dataclass(frozen=True, eq=False)
class MemberNeighbours:
    """Neighbours within M members of a larger pool of N.

    The larger pool is asked for N / M times as many neighbours, so that about the wanted number remains. Within a query
    the order is by similarity, ties by position among the members, whatever order the larger pool has.
    """

    whole: Neighbours
    """The larger pool."""
    members: Int[np.ndarray, " M"]
    """Position of each member in the larger pool."""
    _inside: Int64[np.ndarray, " N"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inside = np.full(len(self.whole), -1, dtype=np.int64)
        inside[self.members] = np.arange(len(self.members))
        object.__setattr__(self, "_inside", inside)

    def __len__(self) -> int:
        return len(self.members)

    def neighbours(self, positions: Int[np.ndarray, " Q"], k: int) -> NeighbourLists:
        """The up to k nearest other members of some members.

        Args:
            positions: [Q] int64, members.
            k: most neighbours per query.
        """
        return self._translate(self.whole.neighbours(self.members[positions], self._wider(k)), k)

    def neighbours_of(self, vectors: Float[np.ndarray, "Q D"], k: int) -> NeighbourLists:
        """The up to k nearest members of some vectors.

        Args:
            vectors: [Q, D] float32.
            k: most neighbours per query.
        """
        return self._translate(self.whole.neighbours_of(vectors, self._wider(k)), k)

    def graph(self, k: int) -> NeighbourLists:
        """The up to k nearest other members of every member.

        Args:
            k: most neighbours per member.
        """
        if len(self.members) < len(self.whole):
            return self.neighbours(np.arange(len(self.members)), k)
        lists = self.whole.graph(k)
        counts = np.diff(lists.indptr)[self.members]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        entries = np.arange(indptr[-1]) + np.repeat(lists.indptr[:-1][self.members] - indptr[:-1], counts)
        return self._translate(NeighbourLists(indptr, lists.positions[entries], lists.similarities[entries]), k)

    def duplicates(self, threshold: float) -> Int64[np.ndarray, " M"]:
        """Clusters of near-duplicates; two members may be joined by a chain through an outsider.

        Args:
            threshold: lowest similarity of a pair of near-duplicates.

        Returns:
            [M] int64: the smallest position in the cluster of each member.
        """
        labels = self.whole.duplicates(threshold)[self.members]
        _, first, cluster = np.unique(labels, return_index=True, return_inverse=True)
        return first.astype(np.int64)[cluster]

    def _wider(self, k: int) -> int:
        return min(len(self.whole), -(-k * len(self.whole) // max(len(self.members), 1)))

    def _translate(self, lists: NeighbourLists, k: int) -> NeighbourLists:
        query = np.repeat(np.arange(len(lists)), np.diff(lists.indptr))
        positions = self._inside[lists.positions]
        kept = positions >= 0
        query, positions, similarities = query[kept], positions[kept], lists.similarities[kept]
        order = np.lexsort((positions, -similarities, query))
        query, positions, similarities = query[order], positions[order], similarities[order]
        starts = np.searchsorted(query, np.arange(len(lists) + 1))
        kept = np.arange(len(query)) - starts[query] < k
        counts = np.bincount(query[kept], minlength=len(lists))
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return NeighbourLists(indptr, positions[kept], similarities[kept])
