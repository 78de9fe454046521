"""A pool of rotated vectors and the engine over it: everything the index answers in positions.

Search has two steps. An engine names candidates, looking at the leading dimensions alone where those hold enough of every
distance; the candidates are ranked on the whole vectors. Exact search takes over where a filter leaves few members, or
where the probed lists ran out of them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from selector.errors import GradientIndexError
from selector.index.backend import Backend, Candidates, radius, rank, similarity
from selector.index.building import Library, flat, rotate
from selector.index.duplicates import duplicate_labels
from selector.index.faiss_backend import FaissIVF
from selector.index.pairs import within
from selector.index.rotation import Rotation
from selector.index.tuning import ENERGY, Plan
from selector.neighbours import NeighbourLists

FEW = 20_000
"""Members that a filter may leave for them to be searched one by one."""

QUERIES = 1 << 14
"""Queries that are answered at once."""


class VectorPool:
    """Rotated vectors, searchable by position and by vector; implements `selector.neighbours.Neighbours`.

    Args:
        vectors: [N, R] rotated; of length 1 under cosine.
        rotation: what rotated them.
        plan: how they are searched.
        engine: the filled engine.
        library: of the engine, and of exact search beside it.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(
        self,
        *,
        vectors: Float32[np.ndarray, "N R"],
        rotation: Rotation,
        plan: Plan,
        engine: Backend,
        library: Library,
        device: str,
    ) -> None:
        self.plan = plan
        self._library: Library = library
        self._vectors, self._rotation, self._engine, self._device = vectors, rotation, engine, device

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def description(self) -> str:
        """What was chosen, why, and what it reaches, in one line."""
        plan, dimensions = self.plan, self._rotation.axes.shape[0]
        parts = [f"{len(self):,} vectors of {dimensions} dimensions, {plan.metric}, {plan.kind}"]
        if plan.leading < self._vectors.shape[1]:
            parts.append(
                f"shortlist over {plan.leading} leading dimensions, which hold {plan.energy:.2f} of the energy"
            )
        elif plan.energy < ENERGY:
            parts.append(f"searched whole: a quarter of the dimensions holds only {plan.energy:.2f} of the energy")
        if isinstance(self._engine, FaissIVF):
            parts.append(f"{plan.n_probe} of {self._engine.lists} lists probed")
        if plan.recall < 1 or plan.expansion > 1:
            short = "" if plan.recall >= plan.goal else f", short of the {plan.goal:g} asked for"
            parts.append(f"{plan.expansion} candidates per neighbour ranked, recall@10 {plan.recall:.4f}{short}")
        return "; ".join([*parts, self._engine.name])

    def neighbours(self, positions: Int[np.ndarray, " Q"], k: int) -> NeighbourLists:
        """The up to k nearest others of some members; a member is never its own neighbour.

        Args:
            positions: [Q] int64, members of the pool.
            k: most neighbours per query.
        """
        return self._nearest(self._vectors[positions], k, excluded=np.asarray(positions))

    def neighbours_of(self, vectors: Float[np.ndarray, "Q D"], k: int) -> NeighbourLists:
        """The up to k nearest members of some vectors.

        Args:
            vectors: [Q, D] in the space that was indexed.
            k: most neighbours per query.
        """
        return self._nearest(self.project(vectors), k)

    def graph(self, k: int) -> NeighbourLists:
        """The up to k nearest others of every member: a sparse graph with N rows.

        Args:
            k: most neighbours per member.
        """
        return self.neighbours(np.arange(len(self)), k)

    def duplicates(self, threshold: float) -> Int64[np.ndarray, " N"]:
        """Clusters of members that a chain of pairs with at least this similarity joins; exact.

        Args:
            threshold: a cosine such as 0.99, or minus a Euclidean distance.

        Returns:
            [N] int64: the smallest position in the cluster of each member, its own when it has no duplicate.

        Raises:
            GradientIndexError: no pair can have, or every pair has, this similarity.
        """
        return duplicate_labels(self._vectors, self._radius(threshold), leading=self._proposing, device=self._device)

    def _within(
        self,
        queries: Float32[np.ndarray, "Q R"],
        threshold: float,
        *,
        allowed: Bool[np.ndarray, " N"] | None = None,
        excluded: Int64[np.ndarray, " Q"] | None = None,
    ) -> NeighbourLists:
        """Every member at least so similar to rotated queries; arguments as for `_nearest`."""
        row, position, squares = within(
            np.asarray(queries), self._vectors, self._radius(threshold), leading=self._proposing, device=self._device
        )
        keep = np.ones(len(row), dtype=bool) if allowed is None else allowed[position]
        if excluded is not None:
            keep &= position != excluded[row]
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row[keep], minlength=len(queries)))])
        return NeighbourLists(bounds, position[keep], similarity(squares[keep], self.plan.metric))

    def _radius(self, threshold: float) -> float:
        cosine = self.plan.metric == "cosine"
        if not (-1 < threshold <= 1 if cosine else threshold <= 0):
            raise GradientIndexError(
                "the similarity is out of range", got=threshold,
                allowed="above -1 and at most 1" if cosine else "minus a distance: 0 or less",
            )  # fmt: skip
        return radius(threshold, self.plan.metric)

    @property
    def _proposing(self) -> int:
        """Leading dimensions that hold enough of every distance to propose pairs."""
        return int(np.searchsorted(self._rotation.energy, ENERGY)) + 1

    @cached_property
    def _exact(self) -> Backend:
        return flat(self._vectors, self._library, self._device)

    @property
    def vectors(self) -> Float32[np.ndarray, "N R"]:
        """Vectors [N, R] by position, rotated, of length 1 under cosine: distances are those that are searched by."""
        return self._vectors

    def project(self, vectors: Float[np.ndarray, "Q D"]) -> Float32[np.ndarray, "Q R"]:
        """Bring vectors from the space that was indexed to that of `vectors`.

        Args:
            vectors: [Q, D] in the space that was indexed.
        """
        return rotate(np.asarray(vectors), None, self._rotation, self.plan.metric)

    def _nearest(
        self,
        queries: Float32[np.ndarray, "Q R"],
        k: int,
        *,
        allowed: Bool[np.ndarray, " N"] | None = None,
        excluded: Int64[np.ndarray, " Q"] | None = None,
    ) -> NeighbourLists:
        """The up to k nearest members of rotated queries.

        Args:
            queries: of length 1 under cosine.
            k: most neighbours per query.
            allowed: which members may be returned; all when None.
            excluded: one member per query that must not be returned.
        """
        if k < 1:
            raise GradientIndexError("k is out of range", got=k, allowed="1 or more")
        counts, positions, squares = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for start in range(0, len(queries), QUERIES):
            rows = slice(start, start + QUERIES)
            found = self._candidates(queries[rows], k, allowed)
            ranked = rank(queries[rows], self._vectors, found, k, None if excluded is None else excluded[rows])
            counts.append(np.diff(ranked[0]))
            positions.append(ranked[1])
            squares.append(ranked[2])
        similarities = similarity(np.concatenate(squares), self.plan.metric)
        return NeighbourLists(np.cumsum(np.concatenate(counts)), np.concatenate(positions), similarities)

    def _candidates(
        self, queries: Float32[np.ndarray, "Q R"], k: int, allowed: Bool[np.ndarray, " N"] | None
    ) -> Candidates:
        available = len(self) if allowed is None else int(allowed.sum())
        width = self.plan.width(k)
        if allowed is not None and available <= max(FEW, width):
            return self._exact.candidates(queries, width, allowed)
        found = self._engine.candidates(np.ascontiguousarray(queries[:, : self.plan.leading]), width, allowed)
        short = np.flatnonzero(found.counts < min(k + 1, available))
        if len(short):
            whole = self._exact.candidates(queries[short], width, allowed)
            found.positions[short, : whole.positions.shape[1]] = whole.positions
            found.counts[short] = whole.counts
        return found

    def _append(self, rows: Float32[np.ndarray, "M R"]) -> None:
        """Take in rotated vectors behind the others."""
        leading = self.plan.leading
        self._vectors = np.concatenate([self._vectors, rows])
        if isinstance(self._engine, FaissIVF):
            self._engine.extend(np.ascontiguousarray(rows[:, :leading]))
        else:
            self._engine = flat(np.ascontiguousarray(self._vectors[:, :leading]), self._library, self._device)
        self.__dict__.pop("_exact", None)
