"""Rows that no store holds, scored as the rows of a store were: their place among those is then comparable."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selector.config import ScoreConfig, from_mapping
from selector.errors import DataError, StoreError

if TYPE_CHECKING:
    import datasets

    from selector.index import GradientIndex
    from selector.store import FeatureStore

SAME = ("model", "tokenizer", "dtype", "loss", "reference", "precision")
"""What must be as it was for the indexed store, or the place of a new row would mean nothing; its settings are replayed."""


def model_of(store: FeatureStore) -> str:
    """Where the model of a store lies.

    Args:
        store: an open feature store.

    Raises:
        StoreError: the store was not made by the command, and does not say.
    """
    if "model" not in store.manifest.command:
        raise StoreError("the store does not say where its model lies", fix="score with the `selector score` command")
    return store.manifest.command["model"]


def template_of(store: FeatureStore) -> Path | None:
    """The file that took the place of the tokenizer's chat template, if any.

    Args:
        store: an open feature store.
    """
    name = store.manifest.command.get("chat_template")
    return Path(name) if name else None


def place(rows: datasets.Dataset, store: FeatureStore, index: GradientIndex) -> np.ndarray:
    """Vectors of new rows in an index: they go through the whole scorer, into a store of their own for a moment.

    Args:
        rows: with the columns of the data set that was scored.
        store: the store that was indexed; its model and settings are used.
        index: of that store.

    Returns:
        [M, D] float32, in the space that was indexed and in the order of the rows.

    Raises:
        StoreError: the index is of another store, or the rows cannot be scored as that was.
        DataError: a row has no score.
    """
    from selector.index.vectors import read_features
    from selector.scorer import load_model, score_dataset

    if index.standardization is None or index.store != store.manifest.fingerprint:
        raise StoreError(
            "the index was made from another store", got=store.manifest.fingerprint, allowed=index.store,
            fix="name the store that was indexed, or build the index again",
        )  # fmt: skip
    identity = store.manifest.identity
    settings: dict[str, Any] = {**store.manifest.command.get("config", {}), "id_column": None, "limit": None}
    config = from_mapping(ScoreConfig, settings, str(store.path))
    model, tokenizer = load_model(model_of(store), identity["dtype"], chat_template=template_of(store))
    with tempfile.TemporaryDirectory() as folder:
        scored = score_dataset(model, tokenizer, rows, Path(folder) / "rows", config)
        changed = [name for name in SAME if scored.manifest.identity.get(name) != identity.get(name)]
        if changed:
            raise StoreError(
                "a row cannot be scored as the store was: " + ", ".join(changed) + " differ",
                got=[scored.manifest.identity.get(name) for name in changed], allowed=[identity.get(name) for name in changed],
                fix="use the model of the store, or score the data set again",
            )  # fmt: skip
        _, features, metadata = read_features(scored, index.standardization.measures)
        missing = sorted(set(range(len(rows))) - set(metadata["row"].tolist()))
        if missing:
            statuses = scored.to_arrow(["row", "status"]).sort_by("row")["status"].to_pylist()
            raise DataError(
                f"{len(missing)} of {len(rows)} rows have no score",
                got=", ".join(f"row {row}: {statuses[row]}" for row in missing[:5]), allowed="rows with a gradient",
                fix="leave them out",
            )  # fmt: skip
        return index.standardization.apply(features)[np.argsort(metadata["row"])]
