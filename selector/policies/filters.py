"""Policies that remove what does not belong, and rank the rest by score.

    deduplicate         near-duplicates: the best of each cluster stays
    mutual-knn          isolated samples, which are nobody's neighbour in return
    mahalanobis         samples far from a clean set
    opposing-signals    large gradients that point against each other
    source-agreement    whole sources whose mean gradient points against that of the others

A filter fills the budget only as far as samples are left; each says how many it removed.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from selector.errors import ConfigError
from selector.neighbours import NeighbourLists
from selector.policies.base import POLICIES, Pool, by_value, require, texts, unit
from selector.policies.budget import Budget
from selector.types import Picks


@POLICIES.register("deduplicate")
def deduplicate(pool: Pool, budget: Budget, *, seed: int, threshold: int | float = 0.95) -> Picks:
    """The highest scores among samples of which none is a near-duplicate of a better one.

    Args:
        pool: the samples, with neighbours.
        budget: how much may be picked.
        seed: not used.
        threshold: lowest similarity of a pair of near-duplicates; pairs join into clusters.
    """
    labels = require(pool, "neighbours").duplicates(threshold)
    order = by_value(pool.values)
    _, first = np.unique(labels[order], return_index=True)
    kept = np.zeros(len(pool), dtype=bool)
    kept[order[first]] = True
    return _kept(pool, budget, kept, "near-duplicates", "best of its near-duplicates")


@POLICIES.register("mutual-knn")
def mutual_knn(pool: Pool, budget: Budget, *, seed: int, k: int = 10, minimum: int = 1, spread: bool = False) -> Picks:
    """The highest scores among samples that have neighbours who count them as neighbours too.

    Source: MuSc, mutual scoring of unlabelled samples.

    Args:
        pool: the samples, with neighbours.
        budget: how much may be picked.
        seed: not used.
        k: neighbours that are looked at.
        minimum: fewest mutual neighbours of a sample that stays.
        spread: weigh each pick by 1 / (1 + mutual neighbours), so that dense regions count less in training.
    """
    if k < 1 or minimum < 0:
        raise ConfigError("mutual-knn is out of range", got=f"k={k}, minimum={minimum}", allowed="k >= 1, minimum >= 0")
    mutual = mutual_neighbours(require(pool, "neighbours").graph(k)) if len(pool) else np.zeros(0, dtype=np.int64)
    weights = 1 / (1 + mutual) if spread else None
    return _kept(pool, budget, mutual >= minimum, "isolated", "has mutual neighbours", weights)


@POLICIES.register("mahalanobis")
def mahalanobis(pool: Pool, budget: Budget, *, seed: int, drop: int | float = 0.05) -> Picks:
    """The highest scores among samples that lie close to the target examples, or to the pool itself.

    Source: Lee et al. 2018, A simple unified framework for detecting out-of-distribution samples (arXiv 1807.03888).

    Args:
        pool: the samples, with vectors; the target, when there is one, is the clean set.
        budget: how much may be picked.
        seed: not used.
        drop: share of the pool to remove, the farthest.
    """
    if not 0 <= drop < 1:
        raise ConfigError("drop is out of range", got=drop, allowed="0 to 1, 1 excluded")
    vectors = require(pool, "vectors")
    kept = np.ones(len(pool), dtype=bool)
    if len(pool):
        distance = mahalanobis_distance(vectors, vectors if pool.target is None else pool.target)
        kept[by_value(distance)[: int(drop * len(pool))]] = False
    return _kept(pool, budget, kept, "outliers", "close to the clean set")


@POLICIES.register("opposing-signals")
def opposing_signals(
    pool: Pool,
    budget: Budget,
    *,
    seed: int,
    cosine: int | float = 0.5,
    large: int | float = 0.9,
    drop: str = "both",
) -> Picks:
    """The highest scores among samples without a large gradient that another large gradient points against.

    Source: Rosenfeld and Risteski 2023, Outliers with Opposing Signals (arXiv 2311.04163).

    Args:
        pool: the samples, with vectors.
        budget: how much may be picked.
        seed: not used.
        cosine: two gradients oppose each other when the cosine of one with the negative other is at least this.
        large: share of the pool with smaller gradients, 0 to 1; only those above can oppose.
        drop: both of a pair, or the one with the lower score.
    """
    if not 0 < cosine <= 1 or not 0 <= large < 1 or drop not in ("both", "worse"):
        got = f"cosine={cosine}, large={large}, drop={drop}"
        raise ConfigError(
            "opposing-signals is out of range", got=got, allowed="0 < cosine <= 1, 0 <= large < 1, drop both or worse"
        )
    vectors = require(pool, "vectors")
    norms = np.linalg.norm(vectors, axis=1)
    loud = np.sort(by_value(norms)[: len(pool) - int(large * len(pool))])
    opposed = unit(vectors[loud]) @ -unit(vectors[loud]).T >= cosine
    if drop == "worse":
        place = np.empty(len(pool), dtype=np.int64)
        place[by_value(pool.values)] = np.arange(len(pool))
        opposed &= place[loud][:, None] > place[loud][None, :]
    kept = np.ones(len(pool), dtype=bool)
    kept[loud[opposed.any(axis=1)]] = False
    return _kept(pool, budget, kept, "opposing", "no opposing gradient")


@POLICIES.register("source-agreement")
def source_agreement(pool: Pool, budget: Budget, *, seed: int, minimum: int | float = 0.0) -> Picks:
    """The highest scores among sources whose mean gradient agrees with those of the others.

    Source: Generalizing Few-Shot NAS with Gradient Matching.

    Args:
        pool: the samples, with vectors.
        budget: how much may be picked.
        seed: not used.
        minimum: lowest mean cosine with the other sources' mean gradients of a source that stays.
    """
    names, matrix = agreement(require(pool, "vectors"), pool.source)
    others = (
        (matrix.sum(axis=1) - np.diag(matrix)) / max(len(names) - 1, 1)
        if len(names) > 1
        else np.full(len(names), np.inf)
    )
    kept = np.isin(pool.source.astype(str), names[others >= minimum])
    return _kept(pool, budget, kept, "disagreeing sources", "from an agreeing source")


def mutual_neighbours(lists: NeighbourLists) -> Int[np.ndarray, " N"]:
    """How many neighbours of each sample count it as a neighbour too.

    Args:
        lists: neighbours of each of N samples.
    """
    n = len(lists)
    queries = np.repeat(np.arange(n), np.diff(lists.indptr))
    forth, back = queries * n + lists.positions, lists.positions * n + queries
    return np.bincount(queries[np.isin(forth, back)], minlength=n)


def mahalanobis_distance(
    vectors: Float[np.ndarray, "N D"], clean: Float[np.ndarray, "M D"]
) -> Float64[np.ndarray, " N"]:
    """Distance from the mean of a clean set in units of its spread along each direction.

    The covariance is shrunk toward a multiple of the identity by D / (M + D), so that few clean examples do not make
    directions in which they happen not to vary infinitely far.

    Args:
        vectors: the samples.
        clean: the clean set, M >= 1.
    """
    clean = np.asarray(clean, dtype=np.float64)
    mean = clean.mean(axis=0)
    centered = clean - mean
    count, width = clean.shape
    covariance = centered.T @ centered / count
    shrinkage = width / (count + width)
    level = max(float(np.trace(covariance)) / width, 1e-300)
    factor = np.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * level * np.eye(width))
    return np.linalg.norm(np.linalg.solve(factor, (np.asarray(vectors, dtype=np.float64) - mean).T), axis=0)


def agreement(vectors: Float[np.ndarray, "N D"], source: np.ndarray) -> tuple[np.ndarray, Float64[np.ndarray, "S S"]]:
    """Cosines between the mean gradients of sources: near 1 to merge, below 0 where they pull against each other.

    Args:
        vectors: gradients or their sketches.
        source: [N] str.

    Returns:
        Names of the sources, ascending, and the matrix of cosines.
    """
    names, codes = np.unique(source.astype(str), return_inverse=True)
    means = np.array([np.asarray(vectors[codes == i], dtype=np.float64).mean(axis=0) for i in range(len(names))])
    means = unit(means.reshape(len(names), vectors.shape[1]))
    return names, means @ means.T


def _kept(
    pool: Pool,
    budget: Budget,
    kept: Bool[np.ndarray, " N"],
    removed: str,
    reason: str,
    weights: np.ndarray | None = None,
) -> Picks:
    """The highest scores of what a filter kept."""
    order = by_value(pool.values)
    picked = budget.prefix(order[kept[order]], pool.n_tokens)
    reasons = texts([reason] * len(picked))
    return Picks(
        picked, reasons, weights=None if weights is None else weights[picked], removed={removed: int((~kept).sum())}
    )
