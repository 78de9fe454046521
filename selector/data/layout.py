"""Find out which column of a data set holds what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selector.config import ScoreConfig
from selector.errors import DataError, SelectorError, did_you_mean, raise_all

if TYPE_CHECKING:
    import datasets

REQUIRED = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Roles that each format needs, in the order in which formats are recognized."""

OPTIONAL = {"instruction": ("input",)}

ALIASES = {"conversations": "messages"}
"""Column names of other habits that hold a role."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps the parts of a sample."""

    format: str
    """One of `REQUIRED`."""
    columns: dict[str, str]
    """Column of each role."""
    id_column: str | None
    """Column of the sample ids."""
    source_column: str | None
    """Column of the sources."""

    def describe(self) -> str:
        """One line for the user."""
        parts = [f"{role} = {column!r}" for role, column in self.columns.items()]
        parts += [f"id = {self.id_column!r}" if self.id_column else "id = hash of the content"]
        parts += [f"source = {self.source_column!r}"] if self.source_column else []
        return f"{self.format}: " + ", ".join(parts)

    def rows(self, dataset: datasets.Dataset, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Contents by role, row after row.

        Args:
            dataset: the data set.
            limit: read only the first so many rows.
        """
        names = list(self.columns.values())
        part = dataset.select_columns(list(dict.fromkeys(names)))
        part = part.select(range(min(limit, len(part)))) if limit is not None else part
        for row in part:
            assert isinstance(row, Mapping)
            yield {role: row[column] for role, column in self.columns.items()}


def recognize(columns: Sequence[str], config: ScoreConfig) -> Layout:
    """Match a data set's columns with the formats.

    Args:
        columns: the data set's column names.
        config: formats and columns that the user set win over recognition.

    Returns:
        The layout; the first format of `REQUIRED` whose columns are all there when the format is automatic.

    Raises:
        DataError: columns that the user named or that every format needs are missing; all of them at once.
    """
    named = dict(entry.split("=", 1) for entry in config.columns)
    by_role = {ALIASES.get(column, column): column for column in reversed(columns)} | named
    problems: list[SelectorError] = []
    settings = {f"columns {role}": column for role, column in named.items()}
    settings |= {"id_column": config.id_column, "source_column": config.source_column}
    for setting, column in settings.items():
        if column is not None and column not in columns:
            problems.append(
                DataError(f"{setting}: the data set has no column {column!r}", allowed=", ".join(columns), fix=did_you_mean(column, columns) or "name another column")
            )
    raise_all(problems)
    candidates = list(REQUIRED) if config.format == "auto" else [config.format]
    matching = [name for name in candidates if all(role in by_role for role in REQUIRED[name])]
    if not matching:
        needed = " | ".join(" + ".join(REQUIRED[name]) for name in candidates)
        raise DataError(
            "the columns fit no format" if config.format == "auto" else f"columns of format {config.format} are missing",
            got="columns " + ", ".join(columns), allowed=needed,
            fix="say which column holds what, for example --columns prompt=question completion=answer",
        )  # fmt: skip
    roles = [*REQUIRED[matching[0]], *(role for role in OPTIONAL.get(matching[0], ()) if role in by_role)]
    source = config.source_column or ("source" if "source" in columns else None)
    return Layout(format=matching[0], columns={role: by_role[role] for role in roles}, id_column=config.id_column, source_column=source)
