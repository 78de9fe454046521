"""How an index searches: which engine holds which dimensions, and how many candidates and lists make the recall asked for.

The kind follows from the memory that it takes; the rest is measured at build time on members of the pool, against exact
search. What was measured is reported, also where it falls short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

from selector.errors import GradientIndexError
from selector.index.backend import Backend, Candidates, Metric, rank
from selector.index.faiss_backend import FaissIVF

Kind = Literal["flat", "ivf", "ivf-sq8", "ivf-pq"]

FLAT_LIMIT = 50_000
"""Most vectors that are searched one by one where nothing else is asked for."""

MEMORY = 1 << 30
"""Bytes that inverted lists may take before they are compressed further."""

SMALLEST = {"flat": 0, "ivf": 64, "ivf-sq8": 64, "ivf-pq": 64}
"""Fewest vectors that each kind can be trained on."""

ON_GPU = ("flat", "ivf-sq8")
"""Kinds whose codes FAISS can compare on a GPU."""

SHORTLIST_FROM = 20_000
"""Fewest vectors for which a shortlist over leading dimensions pays."""

ENERGY = 0.8
"""Least share of the mean squared distance that a quarter of the dimensions has to hold to serve as a shortlist."""

NEAREST = 10
"""Neighbours whose recall is measured."""

QUERIES = 400
"""Members of the pool that recall is measured on."""

EXPANSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Candidates per neighbour that are tried."""

PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of probed lists that are tried, up to a quarter of all lists."""

SPARE = 16
"""Candidates beyond those, so that rounding in an engine moves no answer across the edge of its list."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a built index, as its manifest keeps them."""

    metric: Metric
    """Cosine similarity, or Euclidean distance."""
    kind: Kind
    """Exact search over an array, or inverted lists with codes of 16, 8 or 4 bits per dimension."""
    leading: int
    """Dimensions that the engine searches; candidates are ranked on all of them."""
    energy: float
    """Share of the mean squared distance that a quarter of the dimensions holds."""
    expansion: int = 1
    """Candidates per neighbour."""
    n_probe: int = 0
    """Inverted lists that are read per query; 0 without lists."""
    recall: float = 1.0
    """Measured share of the true `NEAREST` neighbours that are found."""
    goal: float = 0.99
    """The recall that was asked for."""

    def width(self, k: int) -> int:
        """Candidates for k neighbours."""
        return self.expansion * max(k, NEAREST) + SPARE


def choose_kind(count: int, dimensions: int, kind: Kind | Literal["auto"], lists: bool, device: str) -> Kind:
    """Pick the plainest kind that fits the size; on a GPU, which reads a pool in milliseconds, that is exact search.

    Args:
        count: vectors in the pool.
        dimensions: dimensions that the engine would search.
        kind: what was asked for.
        lists: whether the library offers inverted lists.
        device: `"cpu"` or `"cuda"`.

    Raises:
        GradientIndexError: the kind is unknown, or cannot be had here.
    """
    if kind == "auto":
        if count <= FLAT_LIMIT or not lists or device == "cuda":
            return "flat"
        size = count * dimensions
        return "ivf" if 2 * size <= MEMORY else "ivf-sq8" if size <= MEMORY else "ivf-pq"
    if kind not in get_args(Kind):
        raise GradientIndexError("unknown kind of index", got=repr(kind), allowed=", ".join(("auto", *get_args(Kind))))
    if kind != "flat" and not lists:
        raise GradientIndexError(
            f"kind {kind!r} takes FAISS", got="the torch backend", allowed="auto, flat", fix="pip install faiss-cpu"
        )
    check_device(kind, device)
    if count < SMALLEST[kind]:
        raise GradientIndexError(
            f"the pool is too small for kind {kind!r}", got=f"{count} vectors", allowed=f"{SMALLEST[kind]} or more",
            fix="use kind='auto'",
        )  # fmt: skip
    return kind


def check_device(kind: Kind, device: str) -> None:
    """Refuse codes that FAISS compares on the CPU alone.

    Args:
        kind: of the index.
        device: `"cpu"` or `"cuda"`.

    Raises:
        GradientIndexError: the device cannot search this kind.
    """
    if device == "cuda" and kind not in ON_GPU:
        raise GradientIndexError(
            f"kind {kind!r} is searched on the CPU alone", got=device, allowed=", ".join(ON_GPU), fix="use device='cpu'"
        )


class RecallMeter:
    """Recall of an engine on members of the pool, against exact search over all dimensions.

    Args:
        vectors: [N, R] the pool.
        exact: an exact engine over it.
        seed: which members are asked.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N R"], exact: Backend, seed: int) -> None:
        count = len(vectors)
        self._members = np.sort(np.random.default_rng(seed).choice(count, min(QUERIES, count), replace=False))
        self._vectors, self._queries = vectors, vectors[self._members]
        self._exact = exact

    @cached_property
    def _truth(self) -> tuple[int, Float32[np.ndarray, " Q"]]:
        """How many true neighbours there are, and the squared distance of each member's farthest."""
        found = self._exact.candidates(self._queries, NEAREST + SPARE)
        indptr, _, squares = rank(self._queries, self._vectors, found, NEAREST, excluded=self._members)
        return len(squares), squares[indptr[1:] - 1]

    def candidates(self, engine: Backend, leading: int, expansion: int) -> Candidates:
        """What an engine proposes for the asked members.

        Args:
            engine: the engine to measure.
            leading: dimensions that it searches.
            expansion: candidates per neighbour.
        """
        return engine.candidates(np.ascontiguousarray(self._queries[:, :leading]), expansion * NEAREST + SPARE)

    def recall(self, found: Candidates) -> float:
        """Share of true neighbours among candidates; a member as near as the farthest true one counts, so ties cost nothing.

        Args:
            found: what an engine proposes.
        """
        indptr, _, squares = rank(self._queries, self._vectors, found, NEAREST, excluded=self._members)
        total, edges = self._truth
        return float((squares <= np.repeat(edges, np.diff(indptr))).sum() / total)

    def fewest(self, engine: Backend, leading: int, goal: float) -> tuple[int, float]:
        """Fewest candidates per neighbour that reach a recall, or the most that are tried, and what they reach.

        Args:
            engine: the engine to measure.
            leading: dimensions that it searches.
            goal: recall to reach.
        """
        found = self.candidates(engine, leading, EXPANSIONS[-1])

        def cut(expansion: int) -> Candidates:
            width = expansion * NEAREST + SPARE
            return Candidates(found.positions[:, :width], np.minimum(found.counts, width))

        return _first(EXPANSIONS, lambda expansion: self.recall(cut(expansion)), goal)


def tune_lists(engine: FaissIVF, meter: RecallMeter, leading: int, goal: float) -> tuple[int, int, float]:
    """Fewest candidates, then fewest lists, that reach a recall.

    Args:
        engine: filled inverted lists; left with the chosen number of probes.
        meter: measures recall.
        leading: dimensions that the engine searches.
        goal: recall to reach.

    Returns:
        Candidates per neighbour, probed lists, and the recall that they reach.
    """
    probes = tuple(n for n in PROBES if n <= max(1, engine.lists // 4))
    engine.n_probe = probes[-1]
    # a candidate costs less than a list: ranking may lose half of what the lists may
    expansion, _ = meter.fewest(engine, leading, (1 + goal) / 2)

    def probed(n_probe: int) -> float:
        engine.n_probe = n_probe
        return meter.recall(meter.candidates(engine, leading, expansion))

    n_probe, recall = _first(probes, probed, goal)
    return expansion, n_probe, recall


def _first(choices: tuple[int, ...], measure: Callable[[int], float], goal: float) -> tuple[int, float]:
    """First choice that reaches a goal, or the last one, and what it reaches."""
    reached = 0.0
    for choice in choices:
        reached = measure(choice)
        if reached >= goal:
            return choice, reached
    return choices[-1], reached
