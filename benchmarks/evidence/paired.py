"""Means of paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None where the values leave the spread unknown, one alone or all equal, as `high`."""
    high: float | None
    n: int
    """How many values."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float] | Array) -> Interval:
    """Mean of independent values and its 95 % interval under Student's t.

    Args:
        values: such as one paired difference for each seed, one or more.
    """
    found = np.asarray(values, dtype=float)
    mean, n = float(found.mean()), len(found)
    if n < 2 or np.ptp(found) == 0:
        return Interval(mean, None, None, n)
    half = t_quantile(n - 1) * float(found.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile of Student's t distribution.

    Args:
        freedom: degrees of freedom, 1 or more.
        probability: above one half.
    """
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """Probability of a value below t >= 0: with t = sqrt(freedom) tan(angle) the density is a power of the cosine."""
    angle, pieces = math.atan(t / math.sqrt(freedom)), 2000
    density = np.cos((np.arange(pieces) + 0.5) * angle / pieces) ** (freedom - 1)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * angle * float(density.mean())
