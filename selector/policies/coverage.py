"""Policies that cover the pool: every sample should have a picked one near it.

    k-center             smallest radius: repeatedly the sample farthest from all picked ones; drawn to outliers
    facility-location    largest sum of similarities to the nearest picked sample; drawn to dense regions

Both are greedy, within a constant factor of the best (2 and 1 - 1/e). Facility location is lazy: a gain can only
shrink, so a sample is evaluated again only when its old gain is the largest left. Its similarities are rounded to a
grid on which sums are exact, so that a tie is a tie in whatever order the terms were added.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from selector.errors import ConfigError
from selector.neighbours import NeighbourLists
from selector.policies.base import POLICIES, Pool, require, texts
from selector.policies.budget import Budget, Meter
from selector.types import Picks

TOGETHER = 32
"""Gains that are evaluated at once; a few too many cost less than one call for each."""
GRID = 2.0**20
"""Steps of similarity per unit; float64 adds them without rounding up to sums of 2**32."""


@POLICIES.register("k-center")
def k_center(pool: Pool, budget: Budget, *, seed: int) -> Picks:
    """The sample farthest from all picked ones, again and again, beginning with the highest score.

    Source: Gonzalez 1985, Clustering to minimize the maximum intercluster distance.

    Args:
        pool: the samples, with vectors; Euclidean distance. Costs N x D for each pick.
        budget: how much may be picked.
        seed: not used.
    """
    vectors = require(pool, "vectors")
    squares = np.einsum("nd,nd->n", vectors, vectors)
    meter, picked, radii = budget.meter(pool.n_tokens), [], []
    distance = np.full(len(pool), np.inf)
    while len(picked) < len(pool) and meter.open:
        # the first pick has nothing to be far from
        position = int(np.argmax(distance)) if picked else int(np.argmax(pool.values))
        if not meter.take(position):
            break
        picked.append(position)
        radii.append(float(np.sqrt(distance[position])))
        distance[position] = -1.0
        distance = np.minimum(distance, np.maximum(squares + squares[position] - 2 * (vectors @ vectors[position]), 0))
    reasons = [f"distance {radius:.3g} from earlier picks" if i else "highest score" for i, radius in enumerate(radii)]
    return Picks(np.array(picked, dtype=np.int64), texts(reasons))


@POLICIES.register("facility-location")
def facility_location(pool: Pool, budget: Budget, *, seed: int, k: int = 32, quality: int | float = 0.0) -> Picks:
    """The samples that together are most similar to the whole pool.

    Maximizes sum_i max_(j picked) s_ij over a symmetric graph of nearest neighbours. A pair without an edge counts as
    the least similar edge of the graph, so similarities are measured from there.

    Source: Mirchandani and Francis 1990; lazy evaluation by Minoux 1978.

    Args:
        pool: the samples, with neighbours.
        budget: how much may be picked.
        seed: not used.
        k: neighbours of each sample in the graph; more is closer to the exact objective and slower.
        quality: what the highest score is worth in gain, against the lowest; 1 is one sample covered entirely.

    Raises:
        ConfigError: k or quality is out of range.
    """
    if k < 1 or not quality >= 0:
        raise ConfigError(
            "facility-location is out of range", got=f"k={k}, quality={quality}", allowed="k >= 1, quality >= 0"
        )
    neighbours = require(pool, "neighbours")
    if len(pool) == 0:
        return Picks(np.zeros(0, dtype=np.int64), texts([]))
    graph = coverage_graph(neighbours.graph(k))
    ranks = np.argsort(np.argsort(pool.values, kind="stable"), kind="stable") / max(len(pool) - 1, 1)
    picked, gains = lazy_greedy(graph, _grid(quality * ranks * graph.itself), budget.meter(pool.n_tokens))
    return Picks(np.array(picked, dtype=np.int64), texts([f"adds coverage {gain:.3g}" for gain in gains]))


@dataclass(frozen=True, eq=False)
class CoverageGraph:
    """Whom each sample covers, and how well: row j owns the entries `indptr[j]:indptr[j + 1]`."""

    indptr: Int[np.ndarray, " _"]
    """[N + 1] where each row begins, and the end of the last."""
    positions: Int[np.ndarray, " E"]
    """Samples that row j covers."""
    weights: Float64[np.ndarray, " E"]
    """How well, >= 0, on the grid."""
    itself: float
    """How well a sample covers itself, > 0, on the grid."""

    def __len__(self) -> int:
        return len(self.indptr) - 1


def coverage_graph(lists: NeighbourLists) -> CoverageGraph:
    """Make neighbour lists symmetric and measure similarity from the least similar edge.

    Args:
        lists: neighbours of each of N samples.
    """
    n = len(lists)
    covered = np.repeat(np.arange(n), np.diff(lists.indptr))
    itself = similarity_to_itself(lists)
    floor = float(lists.similarities.min()) if len(lists.similarities) else itself - 1
    ends = np.concatenate([covered, lists.positions]), np.concatenate([lists.positions, covered])
    weight = np.concatenate([lists.similarities, lists.similarities]).astype(np.float64) - floor
    # an edge that is found from both ends is kept once
    edges, first = np.unique(ends[0] * n + ends[1], return_index=True)
    indptr = np.searchsorted(edges, np.arange(n + 1) * n)
    return CoverageGraph(indptr, edges % n, _grid(weight[first]), max(float(_grid(itself - floor)), 1 / GRID))


def similarity_to_itself(lists: NeighbourLists) -> float:
    """What a sample's similarity to itself would be: 1 for cosines, 0 for negative distances, which are never positive.

    Args:
        lists: neighbours of each sample of a pool.
    """
    return 1.0 if (lists.similarities > 0).any() else 0.0


def lazy_greedy(graph: CoverageGraph, bonus: Float[np.ndarray, " N"], meter: Meter) -> tuple[list[int], list[float]]:
    """Greedy maximization of coverage plus a bonus for each pick.

    Args:
        graph: whom each sample covers.
        bonus: [N] what a pick is worth in itself, >= 0.
        meter: what is left of the budget.

    Returns:
        Positions in the order of picking, ties to the smaller one, and the gain of each.
    """
    n = len(graph)
    sizes = np.diff(graph.indptr)
    best = np.zeros(n)

    def gains(rows: Int[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
        counts = sizes[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        entries = np.arange(len(owner)) + np.repeat(graph.indptr[rows] - np.cumsum(counts) + counts, counts)
        excess = np.maximum(graph.weights[entries] - best[graph.positions[entries]], 0.0)
        itself = np.maximum(graph.itself - best[rows], 0.0)
        return bonus[rows] + itself + np.bincount(owner, weights=excess, minlength=len(rows))

    heap = [(-gain, j) for j, gain in enumerate(gains(np.arange(n)).tolist())]
    heapq.heapify(heap)
    evaluated = [0] * n
    picked: list[int] = []
    gained: list[float] = []
    while heap and meter.open:
        negative, j = heap[0]
        if evaluated[j] == len(picked):
            heapq.heappop(heap)
            if not meter.take(j):
                break
            picked.append(j)
            gained.append(-negative)
            span = slice(graph.indptr[j], graph.indptr[j + 1])
            covered = graph.positions[span]
            best[covered] = np.maximum(best[covered], graph.weights[span])
            best[j] = max(graph.itself, best[j])
            continue
        stale = []
        while heap and len(stale) < TOGETHER and evaluated[heap[0][1]] != len(picked):
            stale.append(heapq.heappop(heap)[1])
        for j, gain in zip(stale, gains(np.array(stale)).tolist(), strict=True):
            evaluated[j] = len(picked)
            heapq.heappush(heap, (-gain, j))
    return picked, gained


def _grid(similarity: Any) -> Any:
    return np.round(similarity * GRID) / GRID
