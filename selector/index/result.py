"""What a search returns: for each query its neighbours' ids and similarities, the nearest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from selector.neighbours import NeighbourLists


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Neighbours of Q queries; a query with fewer than were asked for has a shorter list, never a filler.

    Example:
        `for ids, similarities in index.search(vectors, k=5): ...`
    """

    lists: NeighbourLists
    """Positions in the index and similarities, as compressed sparse rows."""
    ids: np.ndarray
    """[E] str, the sample id of each entry of `lists`."""

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Float32[np.ndarray, " K"]]]:
        return (self[query] for query in range(len(self)))

    def __getitem__(self, query: int) -> tuple[np.ndarray, Float32[np.ndarray, " K"]]:
        """Ids and similarities of one query."""
        similarities = self.lists[query][1]
        start = int(self.lists.indptr[query])
        return self.ids[start : start + len(similarities)], similarities
