"""Which sample is each row of a trainer's data set? By its id column, else by hashing the columns that survived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from selector.config import ScoreConfig
from selector.data.ids import content_hash, content_ids
from selector.data.layout import recognize
from selector.errors import DataError, IntegrationError, did_you_mean

ID_COLUMNS = ("selector_id", "sample_id", "id")
"""Columns that hold sample ids unless the caller names one; the first is what `Selection.apply` adds."""


def dataset_ids(dataset: Dataset, id_column: str | None, end_token: str | None, wanted: set[str]) -> Sequence[str]:
    """The sample id of each row.

    Args:
        dataset: the trainer's data set as the trainer left it.
        id_column: what the caller named, or None.
        end_token: of the tokenizer; trainers append it to plain completions and texts.
        wanted: ids of the selection, which decide what the ids are: a column of the data set, or hashes of its content.

    Raises:
        IntegrationError: neither a column nor the content gives any of the ids.
    """
    columns: list[str] = dataset.column_names
    if id_column is not None:
        if id_column not in columns:
            raise IntegrationError(
                f"the train data set has no column {id_column!r}", got=", ".join(columns),
                fix=did_you_mean(id_column, columns) or None,
            )  # fmt: skip
        return _column(dataset, id_column)
    for name in ID_COLUMNS:
        if name in columns and not wanted.isdisjoint(ids := _column(dataset, name)):
            return ids
    try:
        rows = list(recognize(columns, ScoreConfig()).rows(dataset))
    except DataError:
        rows = []
    for shortened in (rows, [_without_end(row, end_token) for row in rows]):
        if not wanted.isdisjoint(ids := content_ids(content_hash(row) for row in shortened)):
            return ids
    raise IntegrationError(
        "nothing in the train data set tells which sample a row is",
        got="columns " + ", ".join(columns) + f"; ids such as {min(wanted)!r} are looked for" if wanted else None,
        allowed="a column of ids (" + ", ".join(ID_COLUMNS) + "), or the columns that were scored",
        fix="name the column with id_column=, or train on selection.apply(dataset)",
    )  # fmt: skip


def _column(dataset: Dataset, name: str) -> list[str]:
    return [str(value) for value in dataset[name]]


def _without_end(row: dict[str, Any], end_token: str | None) -> dict[str, Any]:
    """A row without the end token that a trainer appended to its completion or text."""
    return {
        role: value.removesuffix(end_token) if end_token and role in ("completion", "text") and isinstance(value, str) else value
        for role, value in row.items()
    }  # fmt: skip
