"""A pool whose members have ids and metadata: searched by id, by vector, and among those that pass a filter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Float32, Int64

from selector.errors import GradientIndexError
from selector.index.filters import Filter
from selector.index.pool import VectorPool
from selector.index.result import SearchResult
from selector.neighbours import NeighbourLists


class MemberPool(VectorPool):
    """Vectors of samples, asked for and answered with by their ids.

    Args:
        members: ids and metadata, positions as rows.
        pool: the arguments of `VectorPool`.
    """

    def __init__(self, *, members: pa.Table, **pool: Any) -> None:
        super().__init__(**pool)
        self._members = members

    @cached_property
    def ids(self) -> np.ndarray:
        """Sample ids [N], positions as rows."""
        return self._members["sample_id"].to_numpy()

    @cached_property
    def _names(self) -> pa.Array:
        """The same in one piece: to take from many pieces costs milliseconds for ten ids."""
        return self._members["sample_id"].combine_chunks()

    def search(
        self, vectors: Float[np.ndarray, "Q D"], k: int = 10, *, where: Filter | None = None, opposing: bool = False
    ) -> SearchResult:
        """The up to k nearest members of each vector.

        Args:
            vectors: [Q, D] in the space that was indexed; for spectral features, `index.standardization.apply(features)`.
            k: most neighbours per query; all that pass the filter where there are fewer.
            where: which members may be returned.
            opposing: search with the negated vectors: members whose gradients pull the other way.

        Returns:
            Ids and similarities per query: cosines, or minus Euclidean distances; the nearest first, ties by position.

        Raises:
            GradientIndexError: vectors of another space, or a filter on a column that is not there.
        """
        return self._named(self._nearest(_turned(self.project(vectors), opposing), k, allowed=self._allowed(where)))

    def search_ids(
        self, ids: Sequence[str], k: int = 10, *, where: Filter | None = None, opposing: bool = False
    ) -> SearchResult:
        """The up to k nearest other members of some members.

        Args:
            ids: [Q] sample ids, each in the index.
            k: most neighbours per query; a member is not its own neighbour.
            where: which members may be returned.
            opposing: search with the negated vectors.

        Raises:
            GradientIndexError: an id is not in the index.
        """
        positions = self.positions(ids)
        queries = _turned(self._vectors[positions], opposing)
        return self._named(self._nearest(queries, k, allowed=self._allowed(where), excluded=positions))

    def search_within(
        self,
        vectors: Float[np.ndarray, "Q D"],
        threshold: float,
        *,
        where: Filter | None = None,
        opposing: bool = False,
    ) -> SearchResult:
        """Every member that is at least so similar to each vector; exact, by a scan of the whole pool.

        Args:
            vectors: [Q, D] in the space that was indexed.
            threshold: lowest similarity: a cosine, or minus a Euclidean distance.
            where: which members may be returned.
            opposing: search with the negated vectors.

        Raises:
            GradientIndexError: the threshold is out of range, or vectors are of another space.
        """
        queries = _turned(self.project(vectors), opposing)
        return self._named(self._within(queries, threshold, allowed=self._allowed(where)))

    def search_ids_within(
        self, ids: Sequence[str], threshold: float, *, where: Filter | None = None, opposing: bool = False
    ) -> SearchResult:
        """Every other member that is at least so similar to each member; arguments as for `search_ids`, `search_within`."""
        positions = self.positions(ids)
        queries = _turned(self._vectors[positions], opposing)
        return self._named(self._within(queries, threshold, allowed=self._allowed(where), excluded=positions))

    def positions(self, ids: Sequence[str]) -> Int64[np.ndarray, " Q"]:
        """Positions of sample ids.

        Args:
            ids: [Q] sample ids.

        Raises:
            GradientIndexError: an id is not in the index.
        """
        asked = pa.array(list(ids), pa.string())
        rows = np.flatnonzero(pc.is_in(self._members["sample_id"], value_set=asked).to_numpy())  # pyright: ignore[reportAttributeAccessIssue]
        found = pc.index_in(asked, value_set=self._members["sample_id"].take(rows).combine_chunks())  # pyright: ignore[reportAttributeAccessIssue]
        if found.null_count:
            missing = asked.filter(pc.is_null(found)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
            raise GradientIndexError(
                f"{len(missing)} ids are not in the index",
                got=", ".join(map(str, missing[:5])),
                fix="add them, or check for samples without a score",
            )
        return rows[found.to_numpy()]

    def metadata(self, ids: Sequence[str] | np.ndarray) -> pa.Table:
        """Metadata columns of some members, one row each.

        Args:
            ids: [Q] sample ids.

        Raises:
            GradientIndexError: an id is not in the index.
        """
        return self._members.take(self.positions(list(ids))).drop_columns("sample_id")

    def _add(self, members: pa.Table, added: Float32[np.ndarray, "M D"]) -> None:
        """Append rotated vectors, after which these are the members."""
        self._members = members
        self._append(added)
        for name in ("ids", "_names"):
            self.__dict__.pop(name, None)

    def _allowed(self, where: Filter | None) -> Bool[np.ndarray, " N"] | None:
        return None if where is None else where.mask(self._members)

    def _named(self, found: NeighbourLists) -> SearchResult:
        return SearchResult(found, self._names.take(pa.array(found.positions)).to_numpy(zero_copy_only=False))


def _turned(queries: Float32[np.ndarray, "Q R"], opposing: bool) -> Float32[np.ndarray, "Q R"]:
    return -queries if opposing else queries
