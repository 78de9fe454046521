"""One number per row for all contrasts: single scores with one sign each, and combinations with one set of weights.

A combination is a pairwise logistic regression: the difference of the features of a better and a worse row says which is which. It
is fitted on the development halves alone, every contrast weighing the same. Features are controlled scores, standardized in the pool
of their contrast, so a weight says how much a standard deviation of one score counts beside the others. The strength of the ridge is
the one that does best on development contrasts of data sets that the weights have not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bootstrap import Order, holm, p_greater
from findings import CONTROL, View, headline
from jaxtyping import Float, Int
from measured import Measured
from sklearn.linear_model import LogisticRegression

BANDS = ("attention", "mlp", "early", "late")
SPECTRA = tuple(f"{measure}, {band}" for measure in ("effective_rank", "nuclear_norm", "stable_rank") for band in BANDS)
FORWARD = ("hidden_effective_rank", "angle_concentration", "logit_nuclear_norm")
SETS = {
    "loss": ("loss",),
    "loss + ifd": ("loss", "ifd"),
    "loss + ifd + other forward scores": ("loss", "ifd", *FORWARD),
    "effective rank + nuclear norm": ("effective_rank", "nuclear_norm"),
    "effective rank + nuclear norm + loss": ("effective_rank", "nuclear_norm", "loss"),
    "spectra": SPECTRA,
    "spectra + loss": (*SPECTRA, "loss"),
    "spectra + loss + ifd": (*SPECTRA, "loss", "ifd"),
    "all": (*SPECTRA, "loss", "ifd", *FORWARD),
}
"""What is combined: an ablation, which says which part carries a result."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of the penalty, for pairs of total weight 1 per contrast."""
PAIRS = 500
"""Random pairs of a contrast that has none."""


@dataclass(frozen=True, eq=False)
class Halves:
    """The headline views of one contrast, and the pool that it is controlled and standardized in."""

    development: View
    test: View
    pool: Int[np.ndarray, " M"]

    @classmethod
    def of(cls, own: Sequence[View], pool: Int[np.ndarray, " M"]) -> Halves:
        """Of the views of one contrast."""
        return cls(headline(own, "development"), headline(own, "test"), pool)

    @property
    def name(self) -> str:
        """Of the contrast."""
        return self.test.contrast.name


def standardized(measured: Measured, name: str, pool: Int[np.ndarray, " M"]) -> Float[np.ndarray, " N"]:
    """A controlled score with mean 0 and deviation 1 in a pool; a row without one counts as average."""
    values = measured.controlled(name, CONTROL, pool)
    own = values[pool]
    return (
        np.nan_to_num((values - np.nanmean(own)) / max(float(np.nanstd(own)), 1e-12))
        if np.isfinite(own).any()
        else np.zeros(len(values))
    )


def differences(view: View, features: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "P F"]:
    """Features of the better minus those of the worse row of each pair."""
    if view.in_pairs:
        better, worse = view.positions[0::2], view.positions[1::2]
    else:
        levels = np.array(view.contrast.levels)[view.rows]
        first, second = np.random.default_rng(0).integers(len(levels), size=(2, 20 * PAIRS))
        apart = np.flatnonzero(levels[first] > levels[second])[:PAIRS]
        better, worse = view.positions[first[apart]], view.positions[second[apart]]
    return features[better] - features[worse]


def fit(pairs: Sequence[Float[np.ndarray, "P F"]], ridge: float) -> Float[np.ndarray, " F"]:
    """Weights by which better rows come before worse ones, each contrast counting the same.

    Args:
        pairs: differences of each contrast.
        ridge: inverse strength of the penalty.
    """
    rows = np.concatenate(list(pairs))
    mass = np.concatenate([np.full(len(one), 1 / len(one)) for one in pairs])
    # each difference in both directions: two classes, and no intercept to fit
    model = LogisticRegression(C=ridge, fit_intercept=False, max_iter=2000)
    model.fit(np.concatenate([rows, -rows]), np.repeat([1, 0], len(rows)), sample_weight=np.tile(mass, 2))
    return model.coef_[0]


def unseen(
    halves: Sequence[Halves], pairs: Sequence[Float[np.ndarray, "P F"]], ridge: float
) -> list[Float[np.ndarray, " F"]]:
    """For each contrast the weights that the contrasts of other data sets give."""
    sources = [one.test.contrast.sources for one in halves]
    found: dict[frozenset[str], Float[np.ndarray, " F"]] = {}
    for own in sources:
        if own not in found:
            others = [pair for pair, other in zip(pairs, sources, strict=True) if not own & other]
            found[own] = fit(others, ridge) if others else np.zeros(pairs[0].shape[1])
    return [found[own] for own in sources]


def combine(measured: Measured, halves: Sequence[Halves], title: str, names: Sequence[str]) -> dict[str, Any]:
    """Fit one combination, and how it orders the test halves.

    Args:
        measured: scores of one model.
        halves: of each contrast.
        title: of the combination.
        names: its scores.
    """
    features = [np.stack([standardized(measured, name, one.pool) for name in names], axis=1) for one in halves]
    pairs = [differences(one.development, own) for one, own in zip(halves, features, strict=True)]

    def on_unseen(ridge: float) -> float:
        wins = [
            np.mean((pair @ w > 0) + 0.5 * (pair @ w == 0))
            for pair, w in zip(pairs, unseen(halves, pairs, ridge), strict=True)
        ]
        return float(np.mean(wins))

    ridge = max(RIDGES, key=on_unseen)
    weights = fit(pairs, ridge)
    orders = [one.test.order(own @ weights) for one, own in zip(halves, features, strict=True)]
    elsewhere = [
        one.test.order(own @ w, resample=False).value
        for one, own, w in zip(halves, features, unseen(halves, pairs, ridge), strict=True)
    ]
    return {
        "score": title, "orders": orders, "development": on_unseen(ridge), "unseen": float(np.nanmean(elsewhere)), "ridge": ridge,
        "weights": dict(zip(names, weights.tolist(), strict=True)),
    }  # fmt: skip


def single(measured: Measured, halves: Sequence[Halves], name: str) -> dict[str, Any]:
    """One controlled score with the sign that does better on the development halves."""
    values = [measured.controlled(name, CONTROL, one.pool) for one in halves]
    mean = float(
        np.nanmean([one.development.order(own, resample=False).value for one, own in zip(halves, values, strict=True)])
    )
    sign = 1.0 if mean >= 0.5 else -1.0
    orders = [one.test.order(sign * own) for one, own in zip(halves, values, strict=True)]
    return {"score": name, "orders": orders, "development": max(mean, 1 - mean), "sign": int(sign)}


def against_loss(candidates: Sequence[dict[str, Any]], halves: Sequence[Halves]) -> list[dict[str, Any]]:
    """Mean test AUC of each candidate, and on how many contrasts it beats controlled loss; the best on development first.

    Args:
        candidates: of `single` and `combine`, one of them named loss.
        halves: of each contrast.
    """
    loss: list[Order] = next(one["orders"] for one in candidates if one["score"] == "loss")
    like = np.array([one.test.matched for one in halves])
    table = []
    for candidate in candidates:
        own: list[Order] = candidate.pop("orders")
        mean = np.nanmean([order.resampled for order in own], axis=0)
        beats = np.array([a.value > b.value for a, b in zip(own, loss, strict=True)])
        turned = np.array([a.value > max(b.value, 1 - b.value) for a, b in zip(own, loss, strict=True)])
        sure = holm([p_greater(a, b) for a, b in zip(own, loss, strict=True)]) < 0.05
        table.append(
            candidate
            | {
                "mean AUC": float(np.nanmean([order.value for order in own])), "low": float(np.nanpercentile(mean, 2.5)),
                "high": float(np.nanpercentile(mean, 97.5)), "mean AUC, like lengths": float(np.nanmean([o.value for o, m in zip(own, like, strict=True) if m])) if like.any() else float("nan"),
                "contrasts": len(own), "beats loss": int(beats.sum()), "surely": int(sure.sum()), "beats loss either way": int(turned.sum()),
                "contrasts of like lengths": int(like.sum()), "beats loss, like lengths": int(beats[like].sum()),
                "by contrast": {one.name: order.value for one, order in zip(halves, own, strict=True)},
            }
        )  # fmt: skip
    return sorted(table, key=lambda row: -row["development"])
