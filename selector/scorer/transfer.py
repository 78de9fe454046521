"""How far scores under a small model stand in for scores under a large one.

The same samples, scored under two models, are compared by rank, raw and with length controlled: raw ranks agree through
length alone, so the controlled ones are the evidence. Layers are matched by their relative depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selector.errors import DataError
from selector.scores import score
from selector.scores.statistics import spearman
from selector.store import FeatureStore
from selector.types import MEASURES, LayerSpec

TOP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Agreement of one measure between two stores."""

    measure: str
    """Which one."""
    samples: int
    """Samples with a score in both stores."""
    raw: float
    """Spearman correlation of the raw scores."""
    controlled: float
    """Spearman correlation of the scores with length controlled."""
    top_overlap: float
    """Share of the best tenth of one store, length controlled, that is among the best tenth of the other; 0.1 by chance."""
    by_projection: dict[str, float]
    """Mean Spearman correlation of the raw features of matched layers, for each projection that both have."""


def transfer(first: FeatureStore, second: FeatureStore, measures: tuple[str, ...] = MEASURES) -> list[Transfer]:
    """Compare two stores of the same samples.

    Args:
        first: under one model.
        second: under another; samples are matched by id.
        measures: what to compare.

    Raises:
        DataError: fewer than two samples are in both.
    """
    shared, here, there = np.intersect1d(first.ids, second.ids, return_indices=True)
    if len(shared) < 2:
        raise DataError(
            "the stores share too few samples", got=f"{len(shared)} ids of {len(first)} and {len(second)}", allowed="2 or more",
            fix="score the same data set with the same id column under both models",
        )  # fmt: skip
    found = []
    for measure in measures:
        scores = [score(store, measure) for store in (first, second)]
        raw = [values.raw[rows] for values, rows in zip(scores, (here, there), strict=True)]
        controlled = [values.values[rows] for values, rows in zip(scores, (here, there), strict=True)]
        both = np.isfinite(controlled[0]) & np.isfinite(controlled[1])
        features = first.features(measure)[here], second.features(measure)[there]
        found.append(
            Transfer(
                measure=measure, samples=int(both.sum()), raw=spearman(*raw), controlled=spearman(*controlled),
                top_overlap=_top_overlap(controlled[0][both], controlled[1][both]),
                by_projection={
                    projection: float(np.nanmean([spearman(features[0][:, i], features[1][:, j]) for i, j in pairs]))
                    for projection, pairs in matched_layers(first.layers, second.layers).items()
                },
            )
        )  # fmt: skip
    return found


def matched_layers(first: tuple[LayerSpec, ...], second: tuple[LayerSpec, ...]) -> dict[str, list[tuple[int, int]]]:
    """Entries of two layer tables at the same relative depth, for each projection that both have.

    Args:
        first: the layer table whose entries all appear.
        second: the one in which the nearest depth is sought; the shallower of two equally near.
    """
    depths = [max((spec.layer for spec in table), default=0) or 1 for table in (first, second)]
    matched: dict[str, list[tuple[int, int]]] = {}
    for i, spec in enumerate(first):
        distances = {
            j: abs(spec.layer / depths[0] - other.layer / depths[1])
            for j, other in enumerate(second)
            if other.projection == spec.projection
        }
        if distances:
            matched.setdefault(spec.projection, []).append((i, min(distances, key=distances.__getitem__)))
    return matched


def _top_overlap(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> float:
    count = max(round(TOP_SHARE * len(first)), 1)
    tops = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / count
