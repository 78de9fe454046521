"""What a selection is held against: a random control of the same size and lengths, and other selections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from selector.errors import SelectionError
from selector.neighbours import Neighbours
from selector.policies import Budget
from selector.policies.base import canonical_order
from selector.policies.coverage import similarity_to_itself
from selector.selection import Selection
from selector.types import Scores

LENGTH_BINS = 20
"""Bins of length in which a matched control draws; within a bin lengths differ by a few percent."""


@dataclass(frozen=True)
class Profile:
    """What kind of samples a selection holds."""

    samples: int
    """How many."""
    tokens: int
    """Tokens of all of them."""
    length_quartiles: tuple[float, float, float]
    """Quartiles of tokens per sample; NaN for an empty selection."""
    sources: dict[str, float]
    """Share of the samples by source."""


@dataclass(frozen=True)
class Comparison:
    """Two selections from one pool, side by side."""

    first: Profile
    """The first selection."""
    second: Profile
    """The second selection."""
    shared: int
    """Samples that both hold."""
    jaccard: float
    """Shared samples over samples of either, 0 to 1; 1 for two empty selections."""
    expected_jaccard: float
    """The same for two random selections of these sizes."""
    length_shift: float
    """Probability that a sample of the second is longer than one of the first, ties counting half; 0.5 is no shift."""
    source_shift: float
    """Total variation between the source mixtures: the share of samples that would have to change source, 0 to 1."""
    coverage: tuple[float, float] | None
    """Mean similarity of the pool's samples to the nearest sample of each selection, where neighbours were given."""


def compare(
    first: Selection, second: Selection, scores: Scores, *, neighbours: Neighbours | None = None, k: int = 64
) -> Comparison:
    """Compare two selections from one pool.

    Args:
        first: a selection, such as a control.
        second: another one.
        scores: the pool that both were made from.
        neighbours: similarity of the pool's samples, positions as in `scores`, for coverage.
        k: neighbours of each sample among which a picked one is looked for; a sample without one counts as the least
            similar of its neighbours.

    Raises:
        SelectionError: a selection holds samples that are not in the pool.
    """
    a, b = _positions(first, scores), _positions(second, scores)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    chance = len(a) * len(b) / max(len(scores), 1)
    profiles = _profile(a, scores), _profile(b, scores)
    mixtures = [
        {name: p.sources.get(name, 0.0) for name in profiles[0].sources | profiles[1].sources} for p in profiles
    ]
    return Comparison(
        first=profiles[0],
        second=profiles[1],
        shared=shared,
        jaccard=shared / union if union else 1.0,
        expected_jaccard=chance / (len(a) + len(b) - chance) if union else 1.0,
        length_shift=_probability_larger(scores.n_tokens[b], scores.n_tokens[a]),
        source_shift=sum(abs(mixtures[0][name] - mixtures[1][name]) for name in mixtures[0]) / 2,
        coverage=None if neighbours is None else _coverage(neighbours, k, a, b),
    )


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


def _positions(selection: Selection, scores: Scores) -> Int[np.ndarray, " K"]:
    asked = pa.array(selection.ids, pa.string())
    found = pc.index_in(asked, value_set=pa.array(scores.ids, pa.string()))
    if found.null_count:
        missing = asked.filter(found.is_null()).to_pylist()
        raise SelectionError(f"{len(missing)} samples of a selection are not in the pool", got=", ".join(missing[:5]))
    return found.to_numpy().astype(np.int64)


def _profile(positions: Int[np.ndarray, " K"], scores: Scores) -> Profile:
    lengths = scores.n_tokens[positions]
    names, counts = np.unique(scores.source[positions].astype(str), return_counts=True)
    first, median, third = np.quantile(lengths, [0.25, 0.5, 0.75]).tolist() if len(lengths) else [float("nan")] * 3
    return Profile(
        samples=len(positions),
        tokens=int(lengths.sum()),
        length_quartiles=(first, median, third),
        sources={name: int(n) / len(positions) for name, n in zip(names.tolist(), counts, strict=True)},
    )


def _probability_larger(a: Int[np.ndarray, " A"], b: Int[np.ndarray, " B"]) -> float:
    """Mann-Whitney: probability that a draw of `a` exceeds one of `b`, ties counting half."""
    if not len(a) or not len(b):
        return 0.5
    ascending = np.sort(b)
    below = np.searchsorted(ascending, a, side="left") + np.searchsorted(ascending, a, side="right")
    return float(below.mean()) / (2 * len(b))


def _coverage(neighbours: Neighbours, k: int, *selections: Int[np.ndarray, " _"]) -> tuple[float, float]:
    lists = neighbours.graph(k)
    n = len(lists)
    query = np.repeat(np.arange(n), np.diff(lists.indptr))
    itself = similarity_to_itself(lists)
    least = np.full(n, itself)
    np.minimum.at(least, query, lists.similarities)
    found: list[float] = []
    for picked in selections:
        inside = np.zeros(n, dtype=bool)
        inside[picked] = True
        best = np.where(inside, itself, least)
        hits = inside[lists.positions]
        np.maximum.at(best, query[hits], lists.similarities[hits])
        found.append(float(best.mean()))
    return found[0], found[1]
