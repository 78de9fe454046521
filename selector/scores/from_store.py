"""Scores of a feature store: one pass over the shards, holding a few numbers per sample and one shard of features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

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
    "layer_profile_difference": False,
    "loss": False,
    "perplexity": False,
    "n_tokens": True,
    "prompt_tokens": True,
    "response_tokens": True,
    "random": True,
}
"""What can be scored by beside the scorers that a store names, and whether high values come first unless the caller says otherwise.

Ranks high and norms low is the direction of arXiv 2504.10766, small differences between layers that of arXiv 2410.23743;
loss, perplexity, length and chance are baselines for every other score.
"""

FROM_SPECTRA = {
    **{measure: (measure,) for measure in MEASURES},
    "stable_rank": ("frobenius_norm", "spectral_norm"),
    "layer_profile_difference": ("nuclear_norm",),
}
"""Measures from which scores are aggregated over the layer table."""

UNCONTROLLED = ("n_tokens", "prompt_tokens", "response_tokens", "random")
"""Length itself, and chance, from which no length is taken out."""

CROSS_ENTROPY = ("response", "chosen", "rejected")
"""Losses whose exponential is a perplexity."""


def available(store: FeatureStore) -> dict[str, bool]:
    """What a store can be scored by.

    Args:
        store: an open feature store.

    Returns:
        Whether high values come first unless the caller says otherwise, by name.
    """
    directions = {name: described["higher_first"] for name, described in store.manifest.scores.items()}
    if store.layers:
        directions = {name: HIGHER_FIRST[name] for name in HIGHER_FIRST if name in FROM_SPECTRA} | directions
    others = [name for name in HIGHER_FIRST if name not in FROM_SPECTRA]
    if store.manifest.identity.get("loss", "response") not in CROSS_ENTROPY:
        others.remove("perplexity")
    return directions | {name: HIGHER_FIRST[name] for name in others}


def score(
    store: FeatureStore,
    by: str | None = None,
    *,
    control: str | LengthControl = "length",
    aggregation: Aggregation | None = None,
    higher_first: bool | None = None,
    seed: int = 0,
) -> Scores:
    """Give every sample of a store one number to select by.

    Args:
        store: an open feature store.
        by: one of the names that `available` lists; effective rank when None, for a store with spectra.
        control: `"length"` (the spline), `"bins"`, `"per-token"`, `"none"`, or a control fitted on another pool.
            Length itself (`by="n_tokens"`, `"prompt_tokens"`, `"response_tokens"`) and `"random"` are never controlled.
        aggregation: how features become one number; the geometric mean of all when None. For `"layer_profile_difference"`
            the mean is always the difference.
        higher_first: whether high values are picked first; the direction of `available` when None.
        seed: from which, with the sample's id, `"random"` is drawn.

    Returns:
        Scores in rows of the data set. A sample whose status is not `ok` has NaN.

    Raises:
        ConfigError: a name that this store has no score of, or settings that the layer table does not allow.
    """
    directions = available(store)
    by = by or "effective_rank"
    if by not in directions:
        spectral = by in FROM_SPECTRA
        raise ConfigError(
            "the store holds no spectra" if spectral else "unknown score, or one that the store does not hold",
            got=by, allowed=", ".join(directions),
            fix="say what to score by, or score into another directory with spectra among --with" if spectral else did_you_mean(by, directions) or None,
        )  # fmt: skip
    aggregation = aggregation or Aggregation()
    if by == "layer_profile_difference":
        aggregation = replace(aggregation, mean="difference")
    if by in UNCONTROLLED:
        control = "none"
    table, raw = _read(store, by, aggregation, seed)
    n_tokens, n_loss = table["n_tokens"].to_numpy(), table["n_loss_tokens"].to_numpy()
    fitted = (
        control if isinstance(control, LengthControl) else control_class(control).fit(raw, n_tokens - n_loss, n_loss)
    )
    higher = directions[by] if higher_first is None else higher_first
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
            **({"seed": seed} if by == "random" else {}),
        },
    )


def _read(
    store: FeatureStore, by: str, aggregation: Aggregation, seed: int
) -> tuple[pa.Table, Float[np.ndarray, " N"]]:
    """Columns that scores keep, and the raw score, both in rows of the data set."""
    measures = FROM_SPECTRA.get(by, ())
    kept = ["sample_id", "row", "source", "n_tokens", "n_loss_tokens"]
    stored = [by] if by == "loss" or by in store.manifest.scores else ["loss"] if by == "perplexity" else []
    reference = None
    if measures and aggregation.scale != "none":
        reference = feature_scale(np.concatenate(list(_all_features(store, by, measures))), aggregation.scale)
    tables: list[pa.Table] = []
    raws: list[Float[np.ndarray, " n"]] = []
    for table in _read_ahead(store.shards([*kept, "status", *measures, *stored])):
        if measures:
            raw = aggregate(_features(table, by, measures, len(store.layers)), store.layers, aggregation, reference)
        else:
            raw = _plain_score(table, by, seed)
        raws.append(np.where(table["status"].to_numpy() == "ok", raw, np.nan))
        tables.append(table.select(kept))
    if not tables:
        raise ConfigError(f"the store {store.path} holds no samples yet", fix="finish `selector score` first")
    table = pa.concat_tables(tables)
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    return table.take(order), np.concatenate(raws)[order]


def _plain_score(table: pa.Table, by: str, seed: int) -> Float[np.ndarray, " n"]:
    """A score that needs no spectra, of the rows of one shard."""
    if by == "random":
        digests = (hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8) for i in table["sample_id"].to_pylist())
        return np.array([int.from_bytes(digest.digest(), "big") for digest in digests]) / 2.0**64
    if by == "prompt_tokens":
        return (table["n_tokens"].to_numpy() - table["n_loss_tokens"].to_numpy()).astype(np.float64)
    column = {"perplexity": "loss", "response_tokens": "n_loss_tokens"}.get(by, by)
    values = pc.fill_null(table[column].cast(pa.float64()), float("nan")).to_numpy()
    return np.exp(values) if by == "perplexity" else values


def _read_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one being read while the last one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = reader.submit(next, tables, None)
            yield table


def _features(table: pa.Table, by: str, measures: Sequence[str], width: int) -> Float[np.ndarray, "N F"]:
    matrices = [feature_matrix(table[name], width) for name in measures]
    if by == "stable_rank":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.square(matrices[0] / matrices[1])
    return matrices[0]


def _all_features(store: FeatureStore, by: str, measures: Sequence[str]) -> Iterator[Float[np.ndarray, "N F"]]:
    for table in store.shards(["status", *measures]):
        yield _features(table.filter(pa.array(table["status"].to_numpy() == "ok")), by, measures, len(store.layers))
