"""Policies made of policies, so that one settings file describes a whole selection.

    policy: then
    budget: 10%
    stages:
      - policy: deduplicate
      - policy: mahalanobis
        drop: 0.02
      - policy: union
        branches:
          - {policy: facility-location, weight: 2, k: 16}
          - {policy: top, weight: 1}

`then` passes what one stage picks on to the next; `union` lets branches pick in turns. A stage or branch is a mapping
with the policy's name and its options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selector.errors import ConfigError
from selector.policies.base import POLICIES, Pool, check_options, texts
from selector.policies.budget import Budget
from selector.policies.quota import fair_order
from selector.types import Picks


@POLICIES.register("then")
def then(pool: Pool, budget: Budget, *, seed: int, stages: Sequence[Mapping[str, Any]]) -> Picks:
    """One policy after the other, each on what the one before has picked.

    Weights multiply from stage to stage.

    Args:
        pool: the samples.
        budget: what the last stage may pick; an earlier one may pick everything unless it names a `budget` of its own.
        seed: for every stage.
        stages: mappings of `policy`, its options and, but for the last, `budget`.

    Raises:
        ConfigError: no stages, or one that cannot be read.
    """
    if not stages:
        raise ConfigError("then has no stages", allowed="one or more")
    members = np.arange(len(pool))
    weights = np.ones(len(pool))
    reasons = texts([""] * len(pool))
    removed: dict[str, int] = {}
    for i, stage in enumerate(stages):
        last = i == len(stages) - 1
        if last and "budget" in stage:
            raise ConfigError(
                "the last stage has a budget of its own", got=stage["budget"], fix="set the budget of the selection"
            )
        part = pool.subset(np.sort(members))
        own = budget if last else Budget.parse(stage.get("budget", 1.0)).resolve(part.n_tokens)
        options = {name: value for name, value in stage.items() if name != "budget"}
        picks = run_stage(part, own, seed, options, "stage")
        members = np.sort(members)[picks.positions]
        if picks.weights is not None:
            weights[members] *= picks.weights
        for p, reason in zip(members, picks.reasons, strict=True):
            reasons[p] = f"{reasons[p]}; {reason}" if reasons[p] else reason
        removed |= {f"{i + 1} {stage['policy']}: {name}": count for name, count in picks.removed.items()}
    return Picks(members, reasons[members], weights=weights[members], removed=removed)


@POLICIES.register("union")
def union(pool: Pool, budget: Budget, *, seed: int, branches: Sequence[Mapping[str, Any]]) -> Picks:
    """Several policies pick in turns from the same pool; a sample that several want counts for the first.

    Args:
        pool: the samples.
        budget: how much may be picked, in all.
        seed: for every branch.
        branches: mappings of `policy`, its options and `weight`, its share of the turns, 1 where none is given.

    Raises:
        ConfigError: no branches, or one that cannot be read.
    """
    if not branches:
        raise ConfigError("union has no branches", allowed="one or more")
    shares = np.array([float(branch.get("weight", 1.0)) for branch in branches])
    if not (np.isfinite(shares) & (shares > 0)).all():
        raise ConfigError("weights of branches must be finite and positive", got=shares.tolist())
    answers = [
        run_stage(pool, budget, seed, {name: value for name, value in branch.items() if name != "weight"}, "branch")
        for branch in branches
    ]
    costs = pool.n_tokens if budget.unit == "tokens" else np.ones(len(pool), dtype=np.int64)
    order, branch = fair_order([answer.positions for answer in answers], shares, costs)
    _, first = np.unique(order, return_index=True)
    first.sort()
    picked = budget.prefix(order[first], pool.n_tokens)
    reasons = np.full((len(answers), len(pool)), None, dtype=object)
    weights = np.ones((len(answers), len(pool)))
    for i, answer in enumerate(answers):
        reasons[i, answer.positions] = answer.reasons
        if answer.weights is not None:
            weights[i, answer.positions] = answer.weights
    owner = branch[first][: len(picked)]
    removed = {
        f"{b['policy']}: {name}": n
        for b, answer in zip(branches, answers, strict=True)
        for name, n in answer.removed.items()
    }
    return Picks(picked, reasons[owner, picked], weights=weights[owner, picked], removed=removed)


def run_stage(pool: Pool, budget: Budget, seed: int, stage: Mapping[str, Any], kind: str) -> Picks:
    """Run one policy of a composition.

    Args:
        pool: what it may pick from.
        budget: how much.
        seed: all that chance may depend on.
        stage: `policy` and its options.
        kind: what to call it in messages.

    Raises:
        ConfigError: it names no policy, or options that the policy does not have.
    """
    name = stage.get("policy")
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} names no policy", got=dict(stage), allowed="policy: NAME and its options")
    options = {key: value for key, value in stage.items() if key != "policy"}
    policy = POLICIES[name]
    check_options(name, policy, options)
    return policy(pool, budget, seed=seed, **options)
