"""How well a score orders labelled rows, with intervals by resampling prompts.

Everything is on the scale of an AUC: the share of comparable pairs that the score puts in the order of their labels, equal scores
counting half. Of two classes that is the area under the ROC curve; of levels it is (1 + D) / 2 with Somers' D; of paired rows the
share of pairs. Intervals are percentiles over resamples of whole groups, since rows of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

BLOCKS = 8
"""Blocks of rows that are compared with all rows below them at one time."""


@dataclass(frozen=True, eq=False)
class Order:
    """How a score orders some rows."""

    value: float
    """0 to 1; NaN where no pair can be compared."""
    resampled: Float[np.ndarray, " B"]
    """The same of each resample; of equal groups and seeds, resamples of two scores are of the same groups."""
    rows: int
    """Rows with a score."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        known = self.resampled[np.isfinite(self.resampled)]
        low, high = np.percentile(known, [2.5, 97.5]) if known.size else (np.nan, np.nan)
        return float(low), float(high)


def resamples(groups: np.ndarray, count: int, seed: int = 0) -> Float[np.ndarray, "B+1 N"]:
    """How often each unit occurs in resamples of whole groups; the first line is the sample itself.

    Args:
        groups: [N] what each unit, a row or a pair, is resampled with.
        count: B.
        seed: of the draws.
    """
    _, group = np.unique(groups, return_inverse=True)
    total = int(group.max(initial=0)) + 1
    counts = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), size=count)
    return np.concatenate([np.ones((1, len(groups))), counts[:, group]]).astype(np.float32)


def concordance(
    scores: Float[np.ndarray, " N"], levels: Float[np.ndarray, " N"], weights: Float[np.ndarray, "B+1 N"]
) -> Order:
    """Share of pairs of different levels whose higher level has the higher score.

    Args:
        scores: NaN where a row has none.
        levels: labels.
        weights: what `resamples` returned.
    """
    order = np.argsort(levels, kind="stable")
    order = order[np.isfinite(scores[order])]
    scores, levels, weights = scores[order], levels[order], weights[:, order]
    starts = np.searchsorted(levels, np.unique(levels)[1:])
    # a score that is a level for nearly every row: a few blocks of rows are as good, and far fewer products
    starts = starts if len(starts) <= BLOCKS else np.linspace(0, len(levels), BLOCKS, endpoint=False).astype(int)
    agreeing, comparable = np.zeros((2, len(weights)))
    for first, last in pairwise([*starts, len(levels)]):
        lower = slice(0, np.searchsorted(levels, levels[last - 1]))
        higher = levels[first:last, None] > levels[lower]
        better, worse = scores[first:last, None], scores[lower]
        wins = higher * ((better > worse) + 0.5 * (better == worse))
        agreeing += ((weights[:, first:last] @ wins.astype(np.float32)) * weights[:, lower]).sum(1, dtype=np.float64)
        if higher.all():
            comparable += weights[:, first:last].sum(1, dtype=np.float64) * weights[:, lower].sum(1, dtype=np.float64)
        else:
            comparable += ((weights[:, first:last] @ higher.astype(np.float32)) * weights[:, lower]).sum(
                1, dtype=np.float64
            )
    return _order(agreeing, comparable, len(scores))


def paired(
    better: Float[np.ndarray, " P"], worse: Float[np.ndarray, " P"], weights: Float[np.ndarray, "B+1 P"]
) -> Order:
    """Share of pairs whose better row has the higher score; a pair counts where both have one.

    Args:
        better: scores.
        worse: scores.
        weights: what `resamples` returned for the pairs.
    """
    both = np.isfinite(better) & np.isfinite(worse)
    wins = ((better > worse) + 0.5 * (better == worse))[both]
    own = weights[:, both].astype(np.float64)
    return _order(own @ wins, own.sum(1), 2 * int(both.sum()))


def p_greater(first: Order, second: Order) -> float:
    """One-sided p value of the first order not being better than the second, both of the same resamples.

    Normal, with the deviation of the resampled difference, so that it can be smaller than one over the number of resamples.
    """
    difference = first.resampled - second.resampled
    deviation = float(np.nanstd(difference)) if np.isfinite(difference).any() else 0.0
    gain = first.value - second.value
    return float(norm.sf(gain / deviation)) if deviation > 0 and np.isfinite(gain) else 1.0


def holm(p_values: Sequence[float]) -> Float[np.ndarray, " K"]:
    """P values corrected for their number by Holm's step-down rule.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def _order(agreeing: Float[np.ndarray, " B+1"], comparable: Float[np.ndarray, " B+1"], rows: int) -> Order:
    with np.errstate(invalid="ignore", divide="ignore"):
        values = agreeing / comparable
    return Order(float(values[0]), values[1:], rows)
