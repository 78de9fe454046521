"""Scores of a feature store: one pass over the shards, holding a few numbers per sample and one shard of features."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from selector.errors import ConfigError, did_you_mean
from selector.scores.aggregate import Aggregation, aggregate, feature_scale
from selector.scores.length import LengthControl, control_class
from selector.store import FeatureStore
from selector.store.reader import feature_matrix
from selector.types import MEASURES, Scores

HIGHER_FIRST = {
    "effective_rank": True,
    "stable_rank": True,
    "nuclear_norm": False,
    "frobenius_norm": False,
    "spectral_norm": False,
    "loss": False,
    "n_tokens": True,
}
"""What can be scored by, and whether high values come first unless the caller says otherwise.

Ranks high and norms low is the direction of arXiv 2504.10766; loss and length are baselines for every other score.
"""


def score(
    store: FeatureStore,
    by: str = "effective_rank",
    *,
    control: str | LengthControl = "length",
    aggregation: Aggregation | None = None,
    higher_first: bool | None = None,
) -> Scores:
    """Give every sample of a store one number to select by.

    Args:
        store: an open feature store.
        by: a measure, `stable_rank`, `loss` or `n_tokens`.
        control: `"length"` (the spline), `"bins"`, `"per-token"`, `"none"`, or a control fitted on another pool.
            Length itself (`by="n_tokens"`) is never controlled.
        aggregation: how features become one number; the geometric mean of all when None.
        higher_first: whether high values are picked first; the direction of `HIGHER_FIRST` when None.

    Returns:
        Scores in rows of the data set. A sample whose status is not `ok` has NaN.

    Raises:
        ConfigError: an unknown name, or settings that the layer table does not allow.
    """
    if by not in HIGHER_FIRST:
        raise ConfigError(
            "unknown score", got=by, allowed=", ".join(HIGHER_FIRST), fix=did_you_mean(by, HIGHER_FIRST) or None
        )
    aggregation = aggregation or Aggregation()
    if by == "n_tokens":
        control = "none"
    table, raw = _read(store, by, aggregation)
    n_tokens, n_loss = table["n_tokens"].to_numpy(), table["n_loss_tokens"].to_numpy()
    fitted = (
        control if isinstance(control, LengthControl) else control_class(control).fit(raw, n_tokens - n_loss, n_loss)
    )
    higher = HIGHER_FIRST[by] if higher_first is None else higher_first
    values = fitted.apply(raw, n_tokens - n_loss, n_loss)
    return Scores(
        ids=table["sample_id"].to_numpy(),
        rows=table["row"].to_numpy(),
        values=values if higher else -values,
        raw=raw,
        n_tokens=n_tokens,
        n_loss_tokens=n_loss,
        source=pc.fill_null(table["source"], "").to_numpy(),
        provenance={
            "store": store.manifest.fingerprint,
            "by": by,
            "higher_first": higher,
            "aggregation": aggregation.describe(),
            "control": fitted.to_dict(),
            "without_score": int(np.isnan(values).sum()),
        },
    )


def _read(store: FeatureStore, by: str, aggregation: Aggregation) -> tuple[pa.Table, Float[np.ndarray, " N"]]:
    """Columns that scores keep, and the raw score, both in rows of the data set."""
    measures = {"stable_rank": ["frobenius_norm", "spectral_norm"]}.get(by, [by] if by in MEASURES else [])
    kept = ["sample_id", "row", "source", "n_tokens", "n_loss_tokens"]
    needed = [*kept, "status", *(measures or [by])]
    reference = None
    if measures and aggregation.scale != "none":
        reference = feature_scale(np.concatenate(list(_all_features(store, by, measures))), aggregation.scale)
    tables: list[pa.Table] = []
    raws: list[Float[np.ndarray, " n"]] = []
    for table in _read_ahead(store.shards(list(dict.fromkeys(needed)))):
        if measures:
            raw = aggregate(_features(table, by, measures, len(store.layers)), store.layers, aggregation, reference)
        else:
            raw = pc.fill_null(table[by].cast(pa.float64()), float("nan")).to_numpy()
        raws.append(np.where(table["status"].to_numpy() == "ok", raw, np.nan))
        tables.append(table.select(kept))
    if not tables:
        raise ConfigError(f"the store {store.path} holds no samples yet", fix="finish `selector score` first")
    table = pa.concat_tables(tables)
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    return table.take(order), np.concatenate(raws)[order]


def _read_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one being read while the last one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = reader.submit(next, tables, None)
            yield table


def _features(table: pa.Table, by: str, measures: list[str], width: int) -> Float[np.ndarray, "N F"]:
    matrices = [feature_matrix(table[name], width) for name in measures]
    if by == "stable_rank":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.square(matrices[0] / matrices[1])
    return matrices[0]


def _all_features(store: FeatureStore, by: str, measures: list[str]) -> Iterator[Float[np.ndarray, "N F"]]:
    for table in store.shards(["status", *measures]):
        yield _features(table.filter(pa.array(table["status"].to_numpy() == "ok")), by, measures, len(store.layers))
