"""Sample ids: a column of the user's, or a hash of the content with an occurrence number."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selector.errors import DataError


def content_hash(row: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of a row's contents by role; missing and None are the same.

    Args:
        row: contents by role, as `Layout.rows` gives them.
    """
    contents = {role: value for role, value in row.items() if value is not None}
    text = json.dumps(contents, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def content_ids(hashes: Iterable[str]) -> list[str]:
    """Ids that stay the same when other rows are added or removed, and keep equal rows apart.

    Args:
        hashes: content hash of each row, in the order of the data set.

    Returns:
        `HASH-0` for the first row of a content, `HASH-1` for its first repetition, and so on.
    """
    seen: Counter[str] = Counter()
    ids = []
    for digest in hashes:
        ids.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return ids


def column_ids(values: Sequence[Any], column: str) -> list[str]:
    """Ids from a column of the data set.

    Args:
        values: the column.
        column: its name, for messages.

    Raises:
        DataError: a value is missing or appears twice.
    """
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise DataError(
            f"column {column!r} has no id in {len(missing)} rows",
            got=f"row {missing[0]}",
            allowed="an id in every row",
            fix="fill them, or leave --id-column out",
        )
    ids = [str(value) for value in values]
    doubled = [name for name, count in Counter(ids).items() if count > 1]
    if doubled:
        raise DataError(
            f"column {column!r} repeats {len(doubled)} ids", got=", ".join(doubled[:3]), allowed="unique ids",
            fix="name a unique column, or leave --id-column out: ids are then hashes of the content",
        )  # fmt: skip
    return ids
