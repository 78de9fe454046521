"""How a store recognizes its data set, and a data set to which rows were appended.

The manifest keeps the number of rows and a hash of all of them. A longer data set continues the store when the hash of
its first rows, as many as the store knows, is the same: then rows were added at the end and nothing else changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selector.errors import StoreError
from selector.store.schema import fingerprint

Lineage = tuple[dict[str, Any], ...]
"""Rows and fingerprint of a data set when its store was begun and after each append."""


def begin(rows: Sequence[str]) -> Lineage:
    """Lineage of a new store.

    Args:
        rows: one string for each row that differs when its contents or id do.
    """
    return ({"rows": len(rows), "fingerprint": fingerprint(list(rows))},)


def extend(store: Path, known: Lineage, rows: Sequence[str], append: bool) -> Lineage:
    """Lineage after this run.

    Args:
        store: the store's directory, for messages.
        known: what the store has recorded.
        rows: one string for each row of the data set, as for `begin`.
        append: whether rows may have been added.

    Raises:
        StoreError: rows were changed or removed, or were added without leave; with both values.
    """
    last = known[-1]
    (now,) = begin(rows)
    same_beginning = len(rows) >= last["rows"] and fingerprint(list(rows[: last["rows"]])) == last["fingerprint"]
    if same_beginning and len(rows) == last["rows"]:
        return known
    got, allowed = (f"{part['rows']:,} rows, fingerprint {part['fingerprint']}" for part in (now, last))
    if not same_beginning:
        raise StoreError(
            f"{store} belongs to another run: data differs", got=got, allowed=f"{allowed}; or these rows and more after them",
            fix="use the same data set, or another output directory",
        )  # fmt: skip
    if not append:
        raise StoreError(
            f"{store} belongs to a shorter data set: data differs", got=f"{got}; the first {last['rows']:,} are the same",
            allowed=allowed, fix="to score the added rows as well, repeat the command with --append",
        )  # fmt: skip
    return (*known, now)


def is_extension(longer: Lineage, shorter: Lineage) -> bool:
    """Whether one lineage goes on where the other ends.

    Args:
        longer: the lineage with at least as many entries.
        shorter: its possible beginning.
    """
    return longer[: len(shorter)] == shorter
