"""From scores and a policy to a selection, and the random control that every selection is held against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from selector.errors import SelectionError
from selector.policies import Budget, run_policy
from selector.scores import LengthControl, read_scores, score
from selector.scores.aggregate import Aggregation
from selector.selection import Selection
from selector.store import FeatureStore
from selector.types import Picks, Scores

LENGTH_BINS = 20
"""Bins of length in which a matched control draws; within a bin lengths differ by a few percent."""


def select(
    scored: FeatureStore | Scores | str | Path,
    by: str | None = None,
    budget: Budget | int | float | str = 0.1,
    policy: str = "top",
    *,
    control: str | LengthControl = "length",
    aggregation: Aggregation | None = None,
    higher_first: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Pick the samples to train on.

    Args:
        scored: a feature store; or scores; or the path of a table of scores.
        by: what to score by, as in `scores.score` (effective rank when None); for a table, the name of one of its
            scores (the first when None). Scores that are passed are used as they are.
        budget: how much to pick: `500`, `"10%"`, `0.1`, `"200k tokens"`, `"10% tokens"`. A share is one of the samples
            that have a score. Tokens are never exceeded, and missed by less than one sample.
        policy: name of a registered policy.
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
        SelectionError: nothing has a score.
    """
    if isinstance(scored, FeatureStore):
        scores = score(
            scored, by or "effective_rank", control=control, aggregation=aggregation, higher_first=higher_first
        )
    elif isinstance(scored, Scores):
        scores = scored
    else:
        scores = read_scores(scored, by)
    if not np.isfinite(scores.values).any():
        raise SelectionError(
            "no sample has a score", got=f"{len(scores)} samples", fix="look at the status column with `selector info`"
        )
    parsed = Budget.parse(budget)
    picks = run_policy(policy, scores, parsed, seed=seed, **options)
    settings = {"policy": policy, "options": options, "budget": str(parsed), "seed": seed}
    return _selection(scores, picks, settings)


def matched_random(selection: Selection, scores: Scores, *, seed: int = 0) -> Selection:
    """A random selection with the token budget and length profile of another one, to tell its merit from its length.

    Lengths are split in bins at the quantiles of the selection. In each bin samples are drawn from the whole pool until
    the next one would exceed the tokens that the selection spends there; what a bin leaves over passes to the next.

    Args:
        selection: the selection to be compared with.
        scores: the pool that it was made from.
        seed: all that chance may depend on.

    Returns:
        Picks in random order; never more tokens than the selection has.
    """
    settings = {"policy": "matched random", "of": selection.provenance, "seed": seed}
    rng = np.random.default_rng(seed)
    by_id = np.argsort(scores.ids, kind="stable")
    pool = rng.permutation(by_id[np.isfinite(scores.values[by_id])])
    n_tokens = np.asarray(scores.n_tokens, dtype=np.int64)
    edges = (
        np.unique(np.quantile(selection.n_tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
        if len(selection)
        else np.zeros(0)
    )
    spent = np.bincount(
        np.searchsorted(edges, selection.n_tokens), weights=selection.n_tokens, minlength=len(edges) + 1
    )
    bins = np.searchsorted(edges, n_tokens[pool])
    left, drawn = 0, []
    for i in reversed(range(len(edges) + 1)):
        left += int(spent[i])
        members = Budget(left, "tokens").prefix(pool[bins == i], n_tokens)
        left -= int(n_tokens[members].sum())
        drawn.append(members)
    positions = rng.permutation(np.concatenate(drawn))
    reasons = np.array(["drawn at random, matched in length"] * len(positions), dtype=object)
    return _selection(scores, Picks(positions, reasons), settings)


def _selection(scores: Scores, picks: Picks, settings: dict[str, Any]) -> Selection:
    at = picks.positions
    provenance = {
        **settings,
        "scores": scores.provenance,
        "removed": picks.removed,
        "sources": count_by_source(scores, at),
        "versions": {name: _version(name) for name in ("gradient-selector", "numpy")},
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


def count_by_source(scores: Scores, positions: Int[np.ndarray, " K"]) -> dict[str, dict[str, int]]:
    """Samples and tokens of each source before and after a selection.

    Args:
        scores: the pool.
        positions: the picked samples.

    Returns:
        By source: samples, tokens, picked_samples, picked_tokens.
    """
    names, codes = np.unique(scores.source.astype(str), return_inverse=True)
    counts = {
        "samples": np.bincount(codes, minlength=len(names)),
        "tokens": np.bincount(codes, weights=scores.n_tokens, minlength=len(names)),
        "picked_samples": np.bincount(codes[positions], minlength=len(names)),
        "picked_tokens": np.bincount(codes[positions], weights=scores.n_tokens[positions], minlength=len(names)),
    }
    return {str(name): {key: int(column[i]) for key, column in counts.items()} for i, name in enumerate(names)}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "source tree"
