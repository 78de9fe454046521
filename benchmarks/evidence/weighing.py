"""One set of weights for all contrasts: a pairwise logistic regression, fitted on development and looked at on test.

A contrast is turned into differences of feature vectors, better minus worse, of its pairs or of random pairs of different levels;
each contrast weighs the same. The features are controlled scores, standardized within their pool, so a weight says how much a
standard deviation of one score counts beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from contrasts import Contrast
from jaxtyping import Float
from measured import Measured
from sklearn.linear_model import LogisticRegression

if TYPE_CHECKING:
    from claims import View

SPECTRA = tuple(
    f"{measure}, {part}"
    for measure in ("effective_rank", "nuclear_norm", "stable_rank", "spectral_norm")
    for part in ("attention", "mlp", "early", "middle", "late")
)
SETS = {
    "loss": ("loss",),
    "loss + ifd": ("loss", "ifd"),
    "forward scores": ("loss", "ifd", "hidden_effective_rank", "angle_concentration", "logit_nuclear_norm"),
    "effective rank + nuclear norm": ("effective_rank", "nuclear_norm"),
    "spectra": SPECTRA,
    "spectra + loss": (*SPECTRA, "loss"),
    "all": (*SPECTRA, "loss", "ifd", "hidden_effective_rank", "angle_concentration", "logit_nuclear_norm"),
}
"""What is combined: an ablation, which says which part carries a result."""
PAIRS = 400
"""Differences taken of a contrast without pairs."""


def standardized(measured: Measured, names: Sequence[str], pools: Sequence[np.ndarray]) -> Float[np.ndarray, "N F"]:
    """Controlled scores with mean 0 and deviation 1 in each pool; a missing one counts as average."""
    columns = []
    for name in names:
        values = measured.controlled(name, "spline", pools)
        for pool in pools:
            own = values[pool]
            values[pool] = (own - np.nanmean(own)) / max(np.nanstd(own), 1e-12)
        columns.append(np.nan_to_num(values))
    return np.stack(columns, axis=1)


def fit(
    features: Float[np.ndarray, "N F"], views: Sequence[View], positions: Sequence[np.ndarray]
) -> Float[np.ndarray, " F"]:
    """Weights by which the better rows come before the worse ones.

    Args:
        features: standardized scores of all rows.
        views: development halves.
        positions: rows of each view.
    """
    rng = np.random.default_rng(0)
    differences, weights = [], []
    for view, at in zip(views, positions, strict=True):
        if view.kind == "paired":
            better, worse = at[0::2], at[1::2]
        else:
            first, second = rng.integers(len(at), size=(2, 4 * PAIRS))
            higher = view.levels[first] > view.levels[second]
            better, worse = at[first[higher]][:PAIRS], at[second[higher]][:PAIRS]
        differences.append(features[better] - features[worse])
        weights.append(np.full(len(better), 1 / max(len(better), 1)))
    rows, mass = np.concatenate(differences), np.concatenate(weights)
    # each difference counts in both directions, so that the regression needs no intercept and has two classes
    model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    mass = np.tile(mass / mass.mean(), 2) / len(differences)
    model.fit(np.concatenate([rows, -rows]), np.repeat([1, 0], len(rows)), sample_weight=mass * 20)
    return model.coef_[0]


def combination_tables(
    measured: Measured,
    contrasts: Sequence[Contrast],
    pools: Sequence[np.ndarray],
    views_of: Callable[[Contrast], list[View]],
) -> list[dict[str, Any]]:
    """Mean test AUC of each set of scores, and on how many contrasts it beats controlled loss.

    Args:
        measured: scores of one model.
        contrasts: all of them.
        pools: positions of the rows of each pool.
        views_of: the halves of a contrast, length-matched where that can be had.
    """
    every = [view for contrast in contrasts for view in views_of(contrast)]
    development, test = ([view for view in every if view.half == half] for half in ("development", "test"))
    at = {id(view): measured.at(view.rows) for view in every}
    table, reference = [], None
    for title, names in SETS.items():
        names = [name for name in names if name in measured.raw]
        features = standardized(measured, names, pools)
        weights = fit(features, development, [at[id(view)] for view in development])
        values = features @ weights
        orders = [view.order(values[at[id(view)]]) for view in test]
        reference = reference or orders
        mean = np.nanmean([order.resampled for order in orders], axis=0)
        low, high = np.nanpercentile(mean, [2.5, 97.5])
        both = list(zip(orders, reference, strict=True))
        table.append(
            {"model": measured.model, "features": title, "mean AUC": float(np.nanmean([order.value for order in orders])),
             "low": float(low), "high": float(high), "contrasts": len(orders),
             "beats loss": sum(a.value > b.value for a, b in both),
             "surely": sum(bool(np.nanpercentile(a.resampled - b.resampled, 2.5) > 0) for a, b in both),
             "weights": dict(zip(names, weights.tolist(), strict=True)),
             "by contrast": {view.contrast.name: order.value for view, order in zip(test, orders, strict=True)}}
        )  # fmt: skip
    return table
