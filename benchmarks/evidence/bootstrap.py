"""How well a score orders labelled rows, with intervals by resampling prompts.

Everything is on the scale of an AUC: the share of comparable pairs that the score puts in the order of their labels, equal scores
counting half. Of two classes that is the area under the ROC curve; of levels it is (1 + D) / 2 with Somers' D; of paired rows the
share of pairs. Intervals are percentiles over resamples of whole prompts, since rows of one prompt are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, eq=False)
class Order:
    """How a score orders some rows."""

    value: float
    """0 to 1; NaN where no pair can be compared."""
    resampled: Float[np.ndarray, " B"]
    """The same of each resample; of equal rows and seeds, resamples of two scores are of the same prompts."""
    rows: int
    """Rows with a score."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        low, high = np.nanpercentile(self.resampled, [2.5, 97.5]) if self.resampled.size else (np.nan, np.nan)
        return float(low), float(high)


def resamples(groups: np.ndarray, count: int, seed: int) -> Float[np.ndarray, "B+1 N"]:
    """How often each row occurs in resamples of whole groups; the first line is the sample itself.

    Args:
        groups: [N] the prompt of each row.
        count: B.
        seed: of the draws.
    """
    _, group = np.unique(groups, return_inverse=True)
    total = int(group.max(initial=-1)) + 1
    counts = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / max(total, 1)), size=count)
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
    scored = np.isfinite(scores)
    scores, levels, weights = scores[scored], levels[scored], weights[:, scored]
    comparable = (levels[:, None] > levels[None, :]).astype(np.float32)
    agreeing = comparable * ((scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])).astype(np.float32)
    return _order(((weights @ agreeing) * weights).sum(1), ((weights @ comparable) * weights).sum(1), len(scores))


def paired(scores: Float[np.ndarray, " N"], weights: Float[np.ndarray, "B+1 N"]) -> Order:
    """Share of pairs whose first row has the higher score.

    Args:
        scores: better and worse row of each pair in turn; a pair counts where both have one.
        weights: what `resamples` returned; the rows of a pair belong to one group.
    """
    better, worse = scores[0::2], scores[1::2]
    both = np.isfinite(better) & np.isfinite(worse)
    wins = ((better > worse) + 0.5 * (better == worse))[both].astype(np.float32)
    own = weights[:, 0::2][:, both]
    return _order(own @ wins, own.sum(1), 2 * int(both.sum()))


def matched_pairs(
    better: Float[np.ndarray, "M 2"], worse: Float[np.ndarray, "K 2"], caliper: float
) -> list[tuple[int, int]]:
    """For each better row a worse one of like lengths, each used once, nearest first.

    Args:
        better: log lengths of prompt and completion.
        worse: of the other class.
        caliper: largest difference of each log length.
    """
    distance = np.abs(better[:, None] - worse[None, :]).max(-1)
    pairs, free = [], np.ones(len(worse), dtype=bool)
    for i in np.argsort(distance.min(1, initial=np.inf), kind="stable").tolist():
        candidates = np.where(free, distance[i], np.inf)
        j = int(candidates.argmin()) if len(candidates) else 0
        if len(candidates) and candidates[j] <= caliper:
            free[j] = False
            pairs.append((i, j))
    return pairs


def like_pairs(lengths: Float[np.ndarray, " N"], caliper: float) -> Bool[np.ndarray, " N"]:
    """Rows of pairs whose two completions have like lengths.

    Args:
        lengths: log tokens of better and worse row in turn.
        caliper: largest difference.
    """
    return np.repeat(np.abs(lengths[0::2] - lengths[1::2]) <= caliper, 2)


def _order(agreeing: np.ndarray, comparable: np.ndarray, rows: int) -> Order:
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (agreeing / comparable).astype(np.float64)
    return Order(float(values[0]), values[1:], rows)
