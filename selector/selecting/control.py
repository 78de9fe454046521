"""The random control that every selection is held against."""

from __future__ import annotations

import numpy as np

from selector.policies import Budget
from selector.policies.base import canonical_order
from selector.selection import Selection
from selector.types import Scores

LENGTH_BINS = 20
"""Bins of length in which a matched control draws; within a bin lengths differ by a few percent."""


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
    rng = np.random.default_rng(seed)
    pool = rng.permutation(canonical_order(scores.ids, scores.values))
    n_tokens = np.asarray(scores.n_tokens, dtype=np.int64)
    cuts = np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]
    edges = np.unique(np.quantile(selection.n_tokens, cuts)) if len(selection) else np.zeros(0)
    own = np.searchsorted(edges, selection.n_tokens)
    spent = np.bincount(own, weights=selection.n_tokens, minlength=len(edges) + 1)
    bins = np.searchsorted(edges, n_tokens[pool])
    left, drawn = 0, []
    for i in reversed(range(len(edges) + 1)):
        left += int(spent[i])
        members = Budget(left, "tokens").prefix(pool[bins == i], n_tokens)
        left -= int(n_tokens[members].sum())
        drawn.append(members)
    picked = rng.permutation(np.concatenate(drawn))
    return Selection(
        ids=scores.ids[picked],
        rows=scores.rows[picked],
        weights=np.ones(len(picked)),
        scores=scores.values[picked],
        n_tokens=scores.n_tokens[picked],
        reasons=np.array(["drawn at random, matched in length"] * len(picked), dtype=object),
        provenance={"policy": "matched random", "seed": seed, "of": selection.provenance},
    )
