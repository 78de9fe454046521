"""Two selections from one pool, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from selector.neighbours import Neighbours
from selector.policies.coverage import similarity_to_itself
from selector.selecting.run import find
from selector.selection import Selection
from selector.types import Scores


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
    a, b = (find(one.ids, scores.ids, "the pool") for one in (first, second))
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
