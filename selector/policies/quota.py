"""Policies that divide a budget among groups: by source, by the pool's own mixture, or by cluster.

All of them queue fairly. Within a group samples stand in the order of some policy, and a sample's turn comes when its
group has spent (the sample's middle counted) its share of the budget so far. One sort by that turn gives an order of
which every beginning holds the shares to within one sample of each group, in samples or in tokens; a group that runs
out simply stops queueing, and the others go on in proportion. For samples this is the Sainte-Lague apportionment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from selector.errors import ConfigError, did_you_mean
from selector.policies.base import POLICIES, Pool, by_value, check_options, groups_of, require, texts
from selector.policies.budget import Budget
from selector.policies.clusters import k_means
from selector.types import Picks


def fair_order(
    orders: list[Int[np.ndarray, " _"]], shares: Float[np.ndarray, " G"], costs: Int[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " K"]]:
    """Merge the orders of groups so that each beginning spends in the proportion of their shares.

    Args:
        orders: positions of each group, best first, disjoint.
        shares: share of each group, > 0, in any unit.
        costs: what each sample of the pool costs: ones, or tokens.

    Returns:
        Positions, and the group of each.
    """
    turns = [(np.cumsum(costs[order]) - costs[order] / 2) / share for order, share in zip(orders, shares, strict=True)]
    if not turns:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    positions = np.concatenate(orders).astype(np.int64)
    groups = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    merged = np.lexsort((groups, np.concatenate(turns)))
    return positions[merged], groups[merged]


@POLICIES.register("quota")
def quota(
    pool: Pool,
    budget: Budget,
    *,
    seed: int,
    shares: Mapping[str, int | float] | str = "equal",
    within: str = "top",
    options: Mapping[str, Any] | None = None,
) -> Picks:
    """A share of the budget for each source.

    Args:
        pool: the samples.
        budget: how much may be picked, in all.
        seed: for the inner policy.
        shares: share by source, in any unit (sources that are not named get nothing); `"equal"` for all sources alike;
            `"proportional"` for the pool's own mixture, in the unit of the budget.
        within: policy that orders the samples of a source.
        options: options of that policy.

    Raises:
        ConfigError: a source that does not occur, or shares that are not positive.
    """
    names, codes = groups_of(pool.source)
    costs = pool.n_tokens if budget.unit == "tokens" else np.ones(len(pool), dtype=np.int64)
    if shares == "equal":
        weights = np.ones(len(names))
    elif shares == "proportional":
        weights = np.bincount(codes, weights=costs, minlength=len(names)).astype(float)
    elif isinstance(shares, str):
        raise ConfigError("shares cannot be read", got=shares, allowed="equal, proportional, or a number by source")
    else:
        weights = named_shares(shares, names) if len(pool) else np.zeros(0)
    return _divide(pool, budget, codes, [repr(name) for name in names], weights, seed, within, dict(options or {}))


@POLICIES.register("proportional")
def proportional(pool: Pool, budget: Budget, *, seed: int, within: str = "top") -> Picks:
    """The best of each source, sources mixed as in the pool.

    Args:
        pool: the samples.
        budget: how much may be picked, in all.
        seed: for the inner policy.
        within: policy that orders the samples of a source.
    """
    return quota(pool, budget, seed=seed, shares="proportional", within=within)


@POLICIES.register("cluster-quota")
def cluster_quota(
    pool: Pool, budget: Budget, *, seed: int, clusters: int = 64, balance: int | float = 1.0, within: str = "top"
) -> Picks:
    """A share of the budget for each cluster of similar samples.

    Args:
        pool: the samples, with vectors.
        budget: how much may be picked, in all.
        seed: for k-means and the inner policy.
        clusters: number of clusters.
        balance: 1 gives all clusters equal shares, 0 shares by their size, between them size ** (1 - balance).
        within: policy that orders the samples of a cluster.
    """
    if clusters < 1 or not 0 <= balance <= 1:
        raise ConfigError(
            "cluster-quota is out of range",
            got=f"clusters={clusters}, balance={balance}",
            allowed="clusters >= 1, 0 <= balance <= 1",
        )
    labels = k_means(require(pool, "vectors"), clusters, seed=seed)
    names, codes = np.unique(labels, return_inverse=True)
    weights = np.bincount(codes, minlength=len(names)).astype(float) ** (1 - balance)
    return _divide(pool, budget, codes, [f"cluster {name}" for name in names.tolist()], weights, seed, within, {})


def _divide(
    pool: Pool,
    budget: Budget,
    codes: Int[np.ndarray, " N"],
    names: list[str],
    weights: Float[np.ndarray, " G"],
    seed: int,
    within: str,
    options: dict[str, Any],
) -> Picks:
    """Order each group by the inner policy, queue fairly, spend the budget."""
    policy = POLICIES[within]
    check_options(within, policy, options)
    used = np.flatnonzero(weights > 0)
    orders = []
    for group in used:
        members = np.flatnonzero(codes == group)
        if within == "top":
            orders.append(members[by_value(pool.values[members])])
        else:
            orders.append(members[policy(pool.subset(members), budget, seed=seed, **options).positions])
    costs = pool.n_tokens if budget.unit == "tokens" else np.ones(len(pool), dtype=np.int64)
    order, groups = fair_order(orders, weights[used], costs)
    picked = budget.prefix(order, pool.n_tokens)
    reasons = texts([f"{within} of {names[used[group]]}" for group in groups[: len(picked)]])
    unnamed = int((weights[codes] <= 0).sum()) if len(pool) else 0
    return Picks(picked, reasons, removed={"no quota": unnamed} if unnamed else {})


def named_shares(shares: Mapping[str, int | float], names: list[str]) -> Float[np.ndarray, " G"]:
    """Shares of sources in the order of their names, 0 for those that are not named.

    Args:
        shares: share by source.
        names: the sources that occur.

    Raises:
        ConfigError: a source that does not occur, or shares that are not positive.
    """
    unknown = [name for name in shares if name not in names]
    if unknown:
        raise ConfigError(
            "shares name a source that does not occur",
            got=", ".join(unknown),
            allowed=", ".join(map(repr, names)),
            fix=did_you_mean(unknown[0], names) or None,
        )
    if not all(np.isfinite(share) and share >= 0 for share in shares.values()) or not sum(shares.values()) > 0:
        raise ConfigError("shares must be finite and not negative, and one positive", got=dict(shares))
    return np.array([float(shares.get(name, 0.0)) for name in names])
