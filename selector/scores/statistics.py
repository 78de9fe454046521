"""Rank statistics of scores: how far they restate length, and each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Num

from selector.types import Scores


@dataclass(frozen=True)
class LengthCorrelation:
    """Spearman correlation of a score with the number of tokens, before and after length control."""

    raw: float
    """Of the aggregated measure; NaN when it cannot be computed."""
    controlled: float
    """Of the value that is selected by."""


def length_correlation(scores: Scores) -> LengthCorrelation:
    """How far a score restates length.

    Args:
        scores: scores of a pool; samples without a score are left out.
    """
    return LengthCorrelation(spearman(scores.raw, scores.n_tokens), spearman(scores.values, scores.n_tokens))


def correlations(scores: Mapping[str, Scores]) -> tuple[list[str], Float64[np.ndarray, "S S"]]:
    """Spearman correlations of all scores with each other and with length.

    Args:
        scores: scores by name, of the same samples in the same order.

    Returns:
        Names (those of the scores, then `n_tokens` and `n_loss_tokens`) and the symmetric matrix; NaN where one of the
        two does not vary.
    """
    first = next(iter(scores.values()))
    columns = {name: one.values for name, one in scores.items()}
    columns |= {"n_tokens": first.n_tokens, "n_loss_tokens": first.n_loss_tokens}
    matrix = np.array([[spearman(a, b) for b in columns.values()] for a in columns.values()])
    return list(columns), matrix


def spearman(a: Num[np.ndarray, " N"], b: Num[np.ndarray, " N"]) -> float:
    """Spearman rank correlation, ties sharing their mean rank, over the pairs where both are finite.

    Args:
        a: one variable.
        b: the other.

    Returns:
        -1 to 1; NaN when fewer than two pairs are left or one variable does not vary.
    """
    both = np.isfinite(a) & np.isfinite(b)
    x, y = mean_ranks(np.asarray(a)[both]), mean_ranks(np.asarray(b)[both])
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else float("nan")


def spearman_interval(rho: float, count: int) -> tuple[float, float]:
    """Where the correlation of the whole population lies, with 95 % confidence.

    Source: Bonett and Wright 2000, Sample size requirements for estimating Pearson, Kendall and Spearman correlations.

    Args:
        rho: the correlation of a sample.
        count: pairs in the sample.

    Returns:
        Lower and upper end; -1 and 1 where nothing can be said.
    """
    if count <= 3 or not np.isfinite(rho):
        return -1.0, 1.0
    center, half = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12)), 1.96 * np.sqrt((1 + rho**2 / 2) / (count - 3))
    return float(np.tanh(center - half)), float(np.tanh(center + half))


def mean_ranks(values: Num[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Rank of each value from 1, equal values sharing the mean of their ranks.

    Args:
        values: finite numbers.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
