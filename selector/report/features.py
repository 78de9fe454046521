"""Layer x projection means of every measure, group by group, in one pass over the shards.

Measures differ between samples by factors, so means are geometric, as in the scores. A shard is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from selector.report.groups import Group
from selector.store import FeatureStore
from selector.store.reader import feature_matrix
from selector.types import MEASURES

UNITS = {
    "effective_rank": "count",
    "stable_rank": "count",
    "nuclear_norm": "loss per weight",
    "frobenius_norm": "loss per weight",
    "spectral_norm": "loss per weight",
    "layer_profile_difference": "loss per weight",
    "loss": "nats per token",
    "perplexity": "per token",
    "n_tokens": "tokens",
    "prompt_tokens": "tokens",
    "response_tokens": "tokens",
    "random": "0 to 1",
    "ifd": "ratio",
    "hidden_effective_rank": "count",
    "angle_concentration": "cosine",
    "logit_nuclear_norm": "logits",
}
"""Unit of what a sample can be scored by, scorers of others apart."""


def layer_means(store: FeatureStore, groups: Sequence[Group]) -> pa.Table:
    """Geometric mean over the samples of each group, for every measure, layer and projection.

    Args:
        store: an open feature store.
        groups: the first one is the pool.

    Returns:
        Columns kind, group, measure, layer, projection, samples (how many have a positive value), mean (in the unit of the
        measure, null where no sample has one), and ratio_to_pool.
    """
    logs, counts = _sums(store, groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = logs / counts
    fro, spectral = MEASURES.index("frobenius_norm"), MEASURES.index("spectral_norm")
    means = np.concatenate([means, 2 * (means[:, fro] - means[:, spectral])[:, None]], axis=1)
    counts = np.concatenate([counts, np.minimum(counts[:, fro], counts[:, spectral])[:, None]], axis=1)
    measures = [*MEASURES, "stable_rank"]
    n_groups, n_measures, width = means.shape
    layers = store.layers
    return pa.table(
        {
            "kind": np.repeat([group.kind for group in groups], n_measures * width),
            "group": np.repeat([group.title for group in groups], n_measures * width),
            "measure": np.tile(np.repeat(measures, width), n_groups),
            "layer": np.tile([spec.layer for spec in layers], n_groups * n_measures),
            "projection": np.tile([spec.projection for spec in layers], n_groups * n_measures),
            "samples": counts.astype(np.int64).ravel(),
            "mean": pa.array(np.exp(means).ravel(), from_pandas=True),
            "ratio_to_pool": pa.array(np.exp(means - means[:1]).ravel(), from_pandas=True),
        }
    )


def _sums(
    store: FeatureStore, groups: Sequence[Group]
) -> tuple[Float[np.ndarray, "G M F"], Float[np.ndarray, "G M F"]]:
    """Sum of logarithms and number of positive values."""
    width = len(store.layers)
    logs = np.zeros((len(groups), len(MEASURES), width))
    counts = np.zeros_like(logs)
    last = max((int(group.rows.max(initial=0)) for group in groups), default=0)
    belongs = np.zeros((len(groups), last + 2), dtype=bool)
    for i, group in enumerate(groups):
        belongs[i, group.rows] = True
    for table in store.shards(["row", *MEASURES]) if width else ():
        # rows beyond the last one of any group share the spare column, in which nobody is
        inside = belongs[:, np.minimum(table["row"].to_numpy(), last + 1)].astype(np.float32)
        for m, measure in enumerate(MEASURES):
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(feature_matrix(table[measure], width))
            finite = np.isfinite(values)
            logs[:, m] += inside @ np.where(finite, values, 0)
            counts[:, m] += inside @ finite.astype(np.float32)
    return logs, counts
