"""Predict a score from cheap features, so that the rest of a huge pool is ranked without gradients.

A linear model is fitted by ridge regression on hashed words and word pairs of the text (TF-IDF), or on embeddings. A
part of the scored samples is held out; its rank correlation, which comes with the fit, says how far the ranking of the
rest can be trusted. A small correlation is an answer: then the score needs gradients.

Source: Language Models Improve When Pretraining Data Matches Target Tasks (BETR), which distills the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from selector.errors import SelectionError
from selector.scores.features import Features
from selector.scores.statistics import spearman

ITERATIONS = 60
"""Most steps of conjugate gradients; the ridge makes far fewer suffice."""
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Ridge penalties that are tried, in mean squared lengths of a row."""
HELD_OUT = 0.2
"""Share of the scored samples that is not fitted: half of it chooses the penalty, half judges."""
FEWEST = 20
"""Scored samples below which nothing can be held out."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """A linear model of a score, and how well it ranks samples that it has not seen."""

    weights: Float64[np.ndarray, " C"]
    """One for each column of the features."""
    intercept: float
    """Mean score of the samples that it was fitted on."""
    scale: Float64[np.ndarray, " C"]
    """How much each column counts."""
    held_out: float
    """Spearman correlation with the score on held-out samples; NaN when nothing varies."""
    judged: Int64[np.ndarray, " H"]
    """Which samples were held out to judge."""

    @classmethod
    def fit(cls, features: Features, values: Float[np.ndarray, " N"], *, seed: int = 0) -> Distilled:
        """Fit on the samples that have a score.

        Args:
            features: cheap features of every sample.
            values: the score, NaN where a sample has none.
            seed: chooses the held-out part.

        Raises:
            SelectionError: too few samples have a score.
        """
        scored = np.flatnonzero(np.isfinite(values))
        if len(scored) < FEWEST:
            raise SelectionError(
                "too few samples have a score to predict it", got=len(scored), allowed=f"{FEWEST} or more",
                fix="score more of the pool; the scored rows are recognized by their ids",
            )  # fmt: skip
        order = scored[np.random.default_rng(seed).permutation(len(scored))]
        n_held_out = int(HELD_OUT * len(order))
        choose, judge, train = order[: n_held_out // 2], order[n_held_out // 2 : n_held_out], order[n_held_out:]
        scale = features.take(train).column_scale()
        rows = features.scaled(scale)
        mean = float(values[train].mean())
        fits = [ridge(rows.take(train), values[train] - mean, penalty) for penalty in PENALTIES]
        quality = [spearman(rows.take(choose).dot(fit), values[choose]) for fit in fits]
        best = fits[int(np.argmax(np.nan_to_num(quality, nan=-1.0)))]
        return cls(best, mean, scale, spearman(rows.take(judge).dot(best), values[judge]), judge)

    def predict(self, features: Features) -> Float64[np.ndarray, " N"]:
        """The score that is expected of each sample.

        Args:
            features: of the same kind as those of the fit.
        """
        return self.intercept + features.scaled(self.scale).dot(self.weights)

    def fill(self, features: Features, values: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
        """The score of every sample: its own where it has one, else the predicted one.

        Args:
            features: cheap features of every sample.
            values: the score, NaN where a sample has none.
        """
        return np.where(np.isfinite(values), values, self.predict(features))


def ridge(features: Features, wanted: Float[np.ndarray, " N"], penalty: float) -> Float64[np.ndarray, " C"]:
    """Weights w that minimize ||X w - wanted||^2 + penalty ||w||^2 mean(||x||^2), by conjugate gradients.

    Args:
        features: X.
        wanted: what the product should be.
        penalty: > 0.
    """
    penalty *= features.mean_square()
    residual = features.transposed_dot(wanted)
    weights, direction, energy = np.zeros(len(residual)), residual.copy(), float(residual @ residual)
    goal = 1e-12 * energy
    for _ in range(ITERATIONS):
        if energy <= goal:
            break
        curved = features.transposed_dot(features.dot(direction)) + penalty * direction
        step = energy / float(direction @ curved)
        weights += step * direction
        residual -= step * curved
        previous, energy = energy, float(residual @ residual)
        direction = residual + energy / previous * direction
    return weights
