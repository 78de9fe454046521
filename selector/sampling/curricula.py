"""Curricula: which part of a selection comes when.

A curriculum turns the ranks of the samples and the progress through an epoch into sampling weights. The sampler draws an
epoch in stages, each without replacement from what is left, with the weights of its progress; an epoch under a curriculum
is still a permutation, so that no sample is lost or repeated, and the last stages take what the earlier ones left over.

A curriculum is a pure function: one that reacts to the training is a signal (see `signals`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from selector.registry import Registry

Curriculum = Callable[[Float[np.ndarray, " K"], float], Float[np.ndarray, " K"]]
"""`(ranks, progress) -> weights`: ranks [K] in (0, 1), 0 for the lowest score, 1 for the highest; progress in [0, 1)
through the epoch; weights [K] >= 0, where zero means: only when nothing else is left."""

CURRICULA: Registry[Curriculum] = Registry("curriculum")

FIRST_SHARE = 0.1
"""Share of the samples that a growing curriculum begins with."""

BAND_WIDTH = 0.25
"""Width of the moving band, in ranks."""

GAUSSIAN_WIDTH = 0.15
"""Standard deviation of the Gaussian, in ranks."""


def ranks_of(scores: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Ranks of scores, evenly spaced in (0, 1); equal scores keep their order.

    Args:
        scores: [K] no NaN among them.
    """
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = (np.arange(len(scores)) + 0.5) / max(len(scores), 1)
    return ranks


@CURRICULA.register("low-to-high")
def low_to_high(ranks: Float[np.ndarray, " K"], progress: float) -> Float[np.ndarray, " K"]:
    """Draw from the lowest-scored samples, from more and more of them.

    Source:
        Platanios et al., Competence-based curriculum learning for neural machine translation, NAACL 2019, equation 7.
    """
    competence = np.sqrt(progress * (1 - FIRST_SHARE**2) + FIRST_SHARE**2)
    return (ranks <= competence).astype(float)


@CURRICULA.register("high-to-low")
def high_to_low(ranks: Float[np.ndarray, " K"], progress: float) -> Float[np.ndarray, " K"]:
    """Draw from the highest-scored samples, from more and more of them."""
    return low_to_high(1 - ranks, progress)


@CURRICULA.register("moving-band")
def moving_band(ranks: Float[np.ndarray, " K"], progress: float) -> Float[np.ndarray, " K"]:
    """Draw from a band of ranks that moves from the lowest to the highest."""
    lower = progress * (1 - BAND_WIDTH)
    return ((ranks >= lower) & (ranks <= lower + BAND_WIDTH)).astype(float)


@CURRICULA.register("moving-gaussian")
def moving_gaussian(ranks: Float[np.ndarray, " K"], progress: float) -> Float[np.ndarray, " K"]:
    """Draw around a rank that moves from the lowest to the highest."""
    return gaussian(ranks, progress)


@CURRICULA.register("band-mixture")
def band_mixture(ranks: Float[np.ndarray, " K"], progress: float) -> Float[np.ndarray, " K"]:
    """Draw from the lower, middle and upper third at once, in shares that go from 3:2:1 to 1:2:3."""
    shares = np.array([3.0 - 2 * progress, 2.0, 1.0 + 2 * progress])
    return shares[np.minimum((ranks * 3).astype(int), 2)]


def gaussian(ranks: Float[np.ndarray, " K"], center: float) -> Float[np.ndarray, " K"]:
    """Weights that fall off around a rank.

    Args:
        ranks: [K] in (0, 1).
        center: rank of the greatest weight.
    """
    return np.exp(-0.5 * ((ranks - center) / GAUSSIAN_WIDTH) ** 2)
