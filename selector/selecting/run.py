"""From scores, an index and a policy to a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from selector.errors import SelectionError
from selector.neighbours import Neighbours
from selector.policies import Budget, MemberNeighbours, Pool, run_policy
from selector.policies.base import groups_of
from selector.runtime import versions
from selector.scores import Aggregation, LengthControl, read_scores, score
from selector.selecting.shortlist import can_shortlist, shortlist
from selector.selection import Selection
from selector.store import FeatureStore
from selector.types import Picks, Scores


@runtime_checkable
class VectorIndex(Neighbours, Protocol):
    """What is asked of an index: `selector.index.GradientIndex` is one."""

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Position of each sample id; an error names those that are not there."""
        ...

    @property
    def vectors(self) -> np.ndarray:
        """[N, D] float32, by position; inner products and distances are those that the index searches by."""
        ...

    def project(self, vectors: Any) -> np.ndarray:
        """Bring vectors [M, D] from the space that was indexed to that of `vectors`."""
        ...


def select(
    scored: FeatureStore | Scores | str | Path,
    by: str | None = None,
    budget: Budget | int | float | str = 0.1,
    policy: str = "top",
    *,
    index: VectorIndex | None = None,
    vectors: Float[np.ndarray, "N D"] | None = None,
    target: Float[np.ndarray, "M D"] | Sequence[str] | None = None,
    control: str | LengthControl = "length",
    aggregation: Aggregation | None = None,
    higher_first: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Pick the samples to train on.

    Args:
        scored: a feature store; or scores; or the path of a table of scores, of which the policies top, quota and
            proportional read only what the budget can reach.
        by: what to score by, as in `scores.score`; for a table, the name of one of its
            scores (the first when None). Scores that are passed are used as they are.
        budget: how much to pick: `500`, `"10%"`, `0.1`, `"200k tokens"`, `"10% tokens"`. A share is one of the samples
            that have a score. Tokens are never exceeded, and missed by less than one sample.
        policy: name of a registered policy.
        index: an index of the samples, for policies about similarity.
        vectors: a vector for each sample that was scored, in the order of the scores, instead of those of the index;
            such as sketches, which keep the length of gradients.
        target: for policies that match a target, its vectors; or ids of samples of the pool, which are then not picked.
        control: length control, for a store.
        aggregation: how features become one number, for a store.
        higher_first: direction, for a store.
        seed: all that chance may depend on.
        options: the policy's own options.

    Returns:
        The picked samples, best first. Samples without a score are never among them. The provenance tells the
        settings, what each filter removed, and samples and tokens by source before and after.

    Raises:
        ConfigError: unknown policy, score or option, or a budget that cannot be read.
        SelectionError: nothing has a score, or a target is not in the pool.
        GradientIndexError: a sample or target is not in the index.
    """
    parsed = Budget.parse(budget)
    settings = {"policy": policy, "options": options, "budget": str(parsed), "seed": seed}
    if target is not None:
        settings["target"] = f"{len(target)} vectors" if isinstance(target, np.ndarray) else list(target)
    if isinstance(scored, str | Path) and can_shortlist(policy, options):
        short = shortlist(scored, by, parsed, policy, options)
        _check(short.scores)
        picks = run_policy(short.policy, short.scores, short.budget, seed=seed, **short.options)
        return _selection(short.scores, replace(picks, removed=short.removed), settings, short.sources)
    if isinstance(scored, FeatureStore):
        scores = score(scored, by, control=control, aggregation=aggregation, higher_first=higher_first, seed=seed)
    elif isinstance(scored, Scores):
        scores = scored
    else:
        scores = read_scores(scored, by)
    pool = scores if target is None or isinstance(target, np.ndarray) else _without(scores, target)
    _check(pool)
    attach = _attach(scores, index, vectors, target)
    picks = run_policy(policy, pool, parsed, seed=seed, attach=attach, **options)
    return _selection(scores, picks, settings, _by_source(scores.source, scores.n_tokens))


def _check(pool: Scores) -> None:
    if not np.isfinite(pool.values).any():
        raise SelectionError("no sample has a score", fix="look at the status of the samples with `selector info`")


def _attach(
    scores: Scores,
    index: VectorIndex | None,
    vectors: Float[np.ndarray, "N D"] | None,
    target: np.ndarray | Sequence[str] | None,
) -> Callable[[Pool, np.ndarray], Pool]:
    """What adds vectors, neighbours and a target to a pool."""
    if vectors is not None and len(vectors) != len(scores):
        raise SelectionError(
            "vectors do not fit the scores",
            got=f"{len(vectors)} vectors",
            allowed=f"{len(scores)}, in the order of the scores",
        )

    def attach(pool: Pool, kept: np.ndarray) -> Pool:
        members = None if index is None else index.positions(pool.ids.tolist())
        found = target
        if found is not None and not isinstance(found, np.ndarray):
            if vectors is not None:
                found = vectors[find(np.array(found, dtype=object), scores.ids, "the pool")]
            elif index is not None:
                found = index.vectors[index.positions(list(found))]
            else:
                raise SelectionError("a target of sample ids needs vectors", fix="pass index=... or vectors=...")
        elif found is not None and vectors is None and index is not None:
            found = index.project(found)
        own = vectors[kept] if vectors is not None else None
        if own is None and index is not None and members is not None:
            own = index.vectors[members]
        neighbours = None if index is None or members is None else MemberNeighbours(index, members)
        return replace(pool, vectors=own, neighbours=neighbours, target=found)

    return attach


def find(asked: np.ndarray, ids: np.ndarray, where: str) -> Int[np.ndarray, " K"]:
    """Positions of sample ids.

    Args:
        asked: [K] str.
        ids: [N] str.
        where: what holds the ids, for messages.

    Raises:
        SelectionError: some are not there.
    """
    wanted = pa.array(asked, pa.string())
    found = pc.index_in(wanted, value_set=pa.array(ids, pa.string()))  # pyright: ignore[reportAttributeAccessIssue]
    if found.null_count:
        missing = wanted.filter(found.is_null()).to_pylist()
        raise SelectionError(
            f"{len(missing)} samples are not in {where}", got=", ".join(missing[:5]), fix="add them, or score them too"
        )
    return found.to_numpy().astype(np.int64)


def _without(scores: Scores, target: Sequence[str]) -> Scores:
    values = scores.values.copy()
    values[find(np.array(target, dtype=object), scores.ids, "the pool")] = np.nan
    return replace(scores, values=values)


def _selection(scores: Scores, picks: Picks, settings: dict[str, Any], before: dict[str, tuple[int, int]]) -> Selection:
    at = picks.positions
    after = _by_source(scores.source[at], scores.n_tokens[at])
    keys = ("samples", "tokens", "picked_samples", "picked_tokens")
    sources = {
        name: dict(zip(keys, (*counts, *after.get(name, (0, 0))), strict=True)) for name, counts in before.items()
    }
    provenance = {
        **settings,
        "scores": scores.provenance,
        "removed": picks.removed,
        "sources": sources,
        "versions": versions(),
    }
    return Selection(
        ids=scores.ids[at],
        rows=scores.rows[at],
        weights=np.ones(len(at)) if picks.weights is None else picks.weights,
        scores=scores.values[at],
        n_tokens=scores.n_tokens[at],
        reasons=picks.reasons,
        provenance=provenance,
    )


def _by_source(source: np.ndarray, n_tokens: Int[np.ndarray, " N"]) -> dict[str, tuple[int, int]]:
    """Samples and tokens of each source."""
    names, codes = groups_of(source)
    tokens = np.bincount(codes, weights=n_tokens, minlength=len(names))
    counts = np.bincount(codes, minlength=len(names))
    return {name: (int(n), int(t)) for name, n, t in zip(names, counts, tokens, strict=True)}
