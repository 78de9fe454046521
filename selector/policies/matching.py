"""Gradient matching: few samples, with weights, whose gradients add up to those of all.

Orthogonal matching pursuit with non-negative weights. Each step takes the sample that points most along what is still
missing, then fits all weights again. It ends when the budget is spent or nothing that is left would help, so it may
pick less than the budget: D dimensions are matched by at most D samples.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from selector.errors import ConfigError
from selector.policies.base import POLICIES, Pool, require, texts
from selector.policies.budget import Budget, Meter
from selector.policies.quota import fair_order
from selector.types import Picks

TOLERANCE = 1e-4
"""Share of the wanted gradient below which what is missing counts as nothing."""


@POLICIES.register("gradient-matching")
def gradient_matching(pool: Pool, budget: Budget, *, seed: int, mode: str = "joint", ridge: int | float = 0.5) -> Picks:
    """Samples whose weighted gradients add up to the mean gradient of the target, or of the pool when there is none.

    Source: Killamsetty et al. 2021, GRAD-MATCH (arXiv 2103.00123), with the weights kept non-negative.

    Args:
        pool: the samples, with vectors that keep the scale of gradients (sketches rather than standardized features).
        budget: how much may be picked.
        seed: not used.
        mode: match the whole pool's mean (joint), or each source's own, sources queueing by their share of the pool.
        ridge: penalty on the weights as a share of the mean squared length of a vector; spreads the weight over more
            samples.

    Raises:
        ConfigError: an unknown mode or a negative ridge.
    """
    if mode not in ("joint", "source") or not ridge >= 0:
        raise ConfigError(
            "gradient-matching is out of range",
            got=f"mode={mode}, ridge={ridge}",
            allowed="mode joint or source, ridge >= 0",
        )
    vectors = np.asarray(require(pool, "vectors"), dtype=np.float64)
    if mode == "joint":
        groups = [np.arange(len(pool))] if len(pool) else []
    else:
        groups = [np.flatnonzero(pool.source == name) for name in np.unique(pool.source.astype(str))]
    orders, weights = [], np.zeros(len(pool))
    for members in groups:
        wanted = vectors[members].mean(axis=0) if pool.target is None or mode == "source" else pool.target.mean(axis=0)
        chosen, found = matching_pursuit(vectors[members], wanted, budget.meter(pool.n_tokens[members]), ridge)
        orders.append(members[chosen])
        weights[members[chosen]] = found * len(members)
    costs = pool.n_tokens if budget.unit == "tokens" else np.ones(len(pool), dtype=np.int64)
    shares = np.array([costs[members].sum() for members in groups], dtype=float)
    order, _ = fair_order(orders, shares, costs)
    picked = budget.prefix(order, pool.n_tokens)
    return Picks(
        picked, texts([f"matches gradients with weight {weights[p]:.3g}" for p in picked]), weights=weights[picked]
    )


def matching_pursuit(
    vectors: Float[np.ndarray, "N D"], wanted: Float[np.ndarray, " D"], meter: Meter, ridge: int | float
) -> tuple[np.ndarray, Float[np.ndarray, " K"]]:
    """Non-negative orthogonal matching pursuit.

    Args:
        vectors: what may be added up.
        wanted: what the sum should be.
        meter: what is left of the budget.
        ridge: penalty on squared weights, as a share of the mean squared length of a vector.

    Returns:
        Positions in the order of picking, without those whose weight ended at zero, and their weights > 0.
    """
    penalty = ridge * float(np.square(vectors).sum(axis=1).mean()) if len(vectors) else 0.0
    picked: list[int] = []
    weights = np.zeros(0)
    free = np.ones(len(vectors), dtype=bool)
    limit = TOLERANCE * float(np.linalg.norm(wanted))
    while free.any() and meter.open:
        missing = wanted - weights @ vectors[picked] if picked else wanted
        along = np.where(free, vectors @ missing, -np.inf)
        position = int(np.argmax(along))
        if np.linalg.norm(missing) <= limit or along[position] <= 0 or not meter.take(position):
            break
        free[position] = False
        picked.append(position)
        weights = non_negative_ridge(vectors[picked], wanted, penalty, start=np.append(weights, 0.0))
    positive = weights > 0
    return np.array(picked, dtype=np.int64)[positive], weights[positive]


def non_negative_ridge(
    vectors: Float[np.ndarray, "K D"],
    wanted: Float[np.ndarray, " D"],
    penalty: float,
    start: Float[np.ndarray, " K"] | None = None,
) -> Float[np.ndarray, " K"]:
    """Weights w >= 0 that minimize ||w V - wanted||^2 + penalty ||w||^2.

    Source: Lawson and Hanson 1974, Solving Least Squares Problems, algorithm NNLS.

    Args:
        vectors: V.
        wanted: what the sum should be.
        penalty: >= 0.
        start: weights >= 0 to begin with, which saves steps when they are nearly right.
    """
    gram = vectors @ vectors.T + penalty * np.eye(len(vectors))
    right = vectors @ wanted
    weights = np.zeros(len(vectors)) if start is None else start.copy()
    active = weights > 0
    tolerance = 1e-12 * max(float(np.abs(right).max(initial=0)), 1e-300)
    for _ in range(3 * len(vectors) + 1):
        while active.any():
            used = np.flatnonzero(active)
            solved = _solve(gram[np.ix_(used, used)], right[used])
            falling = solved <= 0
            if not falling.any():
                weights[used] = solved
                break
            # go toward the solution until the first weight reaches zero, and let that one leave
            now = weights[used]
            steps = now[falling] / np.maximum(now[falling] - solved[falling], 1e-300)
            weights[used] = now + steps.min() * (solved - now)
            leaving = used[falling][steps <= steps.min()]
            weights[leaving], active[leaving] = 0.0, False
        slope = np.where(active, -np.inf, right - gram @ weights)
        entering = int(np.argmax(slope))
        if slope[entering] <= tolerance:
            break
        active[entering] = True
    return weights


def _solve(gram: Float[np.ndarray, "K K"], right: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    try:
        return np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(gram, right, rcond=None)[0]
