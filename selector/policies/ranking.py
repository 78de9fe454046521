"""Policies that look at the score alone, and the random baseline that looks at nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from selector.errors import ConfigError
from selector.policies.base import POLICIES, Pool, by_value, texts
from selector.policies.budget import Budget
from selector.types import Picks


@POLICIES.register("top")
def top(pool: Pool, budget: Budget, *, seed: int) -> Picks:
    """The highest scores, best first."""
    return _ranked(pool, budget, by_value(pool.values), "highest")


@POLICIES.register("bottom")
def bottom(pool: Pool, budget: Budget, *, seed: int) -> Picks:
    """The lowest scores, lowest first."""
    return _ranked(pool, budget, by_value(-pool.values), "lowest")


@POLICIES.register("random")
def random(pool: Pool, budget: Budget, *, seed: int) -> Picks:
    """Samples drawn without replacement, each with the same chance."""
    order = budget.prefix(np.random.default_rng(seed).permutation(len(pool)), pool.n_tokens)
    return Picks(order, texts(["drawn at random"] * len(order)))


@POLICIES.register("band")
def band(pool: Pool, budget: Budget, *, seed: int, low: int | float = 0.5, high: int | float = 0.95) -> Picks:
    """The highest scores of a band of ranks: a floor, and a cap against outliers that score high for being odd.

    Args:
        pool: the samples.
        budget: how much may be picked.
        seed: not used.
        low: share of the pool below the band, 0 to 1.
        high: share of the pool below the end of the band, 0 to 1.

    Raises:
        ConfigError: the band is empty or out of range.
    """
    if not 0 <= low < high <= 1:
        raise ConfigError("band is no band", got=f"low={low}, high={high}", allowed="0 <= low < high <= 1")
    order = by_value(pool.values)
    first, last = round((1 - high) * len(pool)), round((1 - low) * len(pool))
    picks = _ranked(pool, budget, order[first:last], "highest within the band", ahead=first)
    return Picks(picks.positions, picks.reasons, removed={"above the band": first, "below the band": len(pool) - last})


@POLICIES.register("threshold")
def threshold(
    pool: Pool, budget: Budget, *, seed: int, minimum: int | float, maximum: int | float = float("inf")
) -> Picks:
    """Every score between two values, both included, best first, as far as the budget goes.

    Args:
        pool: the samples.
        budget: how much may be picked; the whole pool to let the values alone decide.
        seed: not used.
        minimum: lowest score.
        maximum: highest score.

    Raises:
        ConfigError: no value can lie between the two.
    """
    if not minimum <= maximum:
        raise ConfigError(
            "threshold is empty", got=f"minimum={minimum}, maximum={maximum}", allowed="minimum <= maximum"
        )
    order = by_value(pool.values)
    descending = pool.values[order]
    inside = order[(descending >= minimum) & (descending <= maximum)]
    above = int((descending > maximum).sum())
    picks = _ranked(pool, budget, inside, "within the threshold", ahead=above)
    return Picks(
        picks.positions,
        picks.reasons,
        removed={"above the maximum": above, "below the minimum": len(pool) - above - len(inside)},
    )


def _ranked(pool: Pool, budget: Budget, order: Int[np.ndarray, " M"], what: str, ahead: int = 0) -> Picks:
    picked = budget.prefix(order, pool.n_tokens)
    return Picks(picked, texts([f"{what}: rank {ahead + i} of {len(pool)}" for i in range(1, len(picked) + 1)]))
