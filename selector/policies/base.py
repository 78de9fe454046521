"""The contract of a selection policy: a pool of arrays and a budget in, positions with reasons out.

    policy(pool, budget, *, seed, **options) -> Picks

A pool is in canonical form: rows ordered by sample id, and only samples that have a score. Whatever a policy draws or
approximates therefore depends on the samples and the seed, never on the order in which they came. Ties go to the
smaller id, which is the smaller position. `run_policy` brings any pool into this form and the answer back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from selector.errors import ConfigError, SelectionError, did_you_mean
from selector.neighbours import Neighbours
from selector.policies.budget import Budget
from selector.policies.members import MemberNeighbours
from selector.registry import Registry
from selector.types import Picks, Scores


@dataclass(frozen=True, eq=False)
class Pool:
    """What a policy may look at: N samples, ordered by id, each with a score."""

    ids: np.ndarray
    """[N] str, strictly ascending."""
    values: Float[np.ndarray, " N"]
    """Score, higher is better, finite."""
    n_tokens: Int[np.ndarray, " N"]
    """Tokens that a training step spends on the sample."""
    source: np.ndarray
    """[N] str, the data set or mixture component."""
    vectors: Float[np.ndarray, "N D"] | None = None
    """Vector of each sample, for policies about similarity."""
    neighbours: Neighbours | None = None
    """Who lies near whom; positions are those of the pool."""
    target: Float[np.ndarray, "M D"] | None = None
    """Vectors of target examples, for policies that match them."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("ids", "values", "n_tokens", "source")}
        if len(set(lengths.values())) > 1:
            raise SelectionError("the columns of a pool differ in length", got=lengths)
        if len(self.ids) > 1 and not (self.ids[1:] > self.ids[:-1]).all():
            raise SelectionError(
                "a pool is not in order", allowed="ids strictly ascending", fix="run policies through run_policy"
            )
        if not np.isfinite(self.values).all():
            raise SelectionError("a pool holds samples without a score", fix="run policies through run_policy")

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, members: Int[np.ndarray, " M"]) -> Pool:
        """Part of the pool.

        Args:
            members: ascending positions.
        """
        return Pool(
            ids=self.ids[members],
            values=self.values[members],
            n_tokens=self.n_tokens[members],
            source=self.source[members],
            vectors=None if self.vectors is None else self.vectors[members],
            neighbours=None if self.neighbours is None else MemberNeighbours(self.neighbours, members),
            target=self.target,
        )


class Policy(Protocol):
    """A selection policy."""

    def __call__(self, pool: Pool, budget: Budget, *, seed: int, **options: Any) -> Picks:
        """Pick samples.

        Args:
            pool: the samples, in canonical form.
            budget: how much may be picked.
            seed: all that chance may depend on.
            options: the policy's own, by keyword.
        """
        ...


POLICIES: Registry[Callable[..., Picks]] = Registry("policy")
"""Selection policies by name."""


def check_options(name: str, policy: Callable[..., Picks], options: dict[str, Any]) -> None:
    """Refuse options that a policy does not have, and missing ones that it needs.

    Args:
        name: the policy, for messages.
        policy: the policy.
        options: what the user passed.

    Raises:
        ConfigError: a name is unknown or missing.
    """
    parameters = {
        k: p for k, p in inspect.signature(policy).parameters.items() if p.kind is p.KEYWORD_ONLY and k != "seed"
    }
    for option in options:
        if option not in parameters:
            raise ConfigError(
                f"the policy {name!r} has no option {option!r}",
                got=option,
                allowed=", ".join(parameters) or "no options",
                fix=did_you_mean(option, parameters) or None,
            )
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in options]
    if missing:
        raise ConfigError(
            f"the policy {name!r} needs options", got=", ".join(options) or "none", allowed=", ".join(missing)
        )


def canonical_order(ids: np.ndarray, values: Float[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Positions of the samples that have a score, by ascending id.

    Args:
        ids: [N] str.
        values: their scores; NaN or infinite where there is none.
    """
    order = (
        pa.table({"id": pa.array(ids, pa.string()), "position": np.arange(len(ids))})
        .sort_by("id")["position"]
        .to_numpy()
    )
    return order[np.isfinite(values[order])]


def run_policy(
    name: str,
    scores: Scores,
    budget: Budget,
    *,
    seed: int,
    attach: Callable[[Pool, np.ndarray], Pool] | None = None,
    **options: Any,
) -> Picks:
    """Run a registered policy on samples in any order.

    Args:
        name: the policy.
        scores: the samples; those without a score are never picked, and counted as removed.
        budget: how much may be picked; a share is a share of the samples that have a score.
        seed: all that chance may depend on.
        attach: adds vectors, neighbours or a target to the pool, given the position in `scores` of each of its rows.
        options: the policy's own.

    Returns:
        Picks whose positions count in `scores`.

    Raises:
        ConfigError: no such policy, or options it does not have.
        SelectionError: the policy needs something that the pool does not have, or picks what is not in it.
    """
    policy = POLICIES[name]
    check_options(name, policy, options)
    kept = canonical_order(scores.ids, scores.values)
    pool = Pool(scores.ids[kept], scores.values[kept], scores.n_tokens[kept], scores.source[kept])
    if attach is not None:
        pool = attach(pool, kept)
    picks = policy(pool, budget.resolve(pool.n_tokens), seed=seed, **options)
    if len(picks.positions) and not 0 <= picks.positions.min() <= picks.positions.max() < len(pool):
        raise SelectionError(
            f"the policy {name!r} picked outside its pool",
            got=f"{picks.positions.min()} to {picks.positions.max()}",
            allowed=len(pool),
        )
    removed = {"no score": len(scores) - len(kept)} if len(kept) < len(scores) else {}
    return replace(picks, positions=kept[picks.positions], removed={**removed, **picks.removed})


def require(pool: Pool, what: Literal["vectors", "neighbours", "target"]) -> Any:
    """A part of the pool that not every pool has.

    Args:
        pool: the samples.
        what: name of the part.

    Raises:
        SelectionError: the pool does not have it.
    """
    part = getattr(pool, what)
    if part is None:
        fix = (
            "pass target=..., ids or vectors of target examples"
            if what == "target"
            else "pass index=..., as built by `selector index`"
        )
        raise SelectionError(f"this policy needs {what}", got="scores alone", fix=fix)
    return part


def unit(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Vectors of length one; a zero vector stays zero.

    Args:
        vectors: in any unit.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def by_value(values: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Positions from the highest value to the lowest, equal values by position.

    Args:
        values: finite numbers.
    """
    return np.argsort(-values, kind="stable")


def texts(values: list[str]) -> np.ndarray:
    """Reasons as an array of Python strings, also when there are none."""
    return np.array(values, dtype=object)
