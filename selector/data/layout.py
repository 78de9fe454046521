"""Find out which column of a data set holds what, and which loss its samples have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selector.config import LossName, ScoreConfig
from selector.errors import DataError, SelectorError, did_you_mean, raise_all

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Format:
    """What the rows of one kind of data set hold."""

    required: tuple[str, ...]
    """Roles that every row needs."""
    optional: tuple[str, ...] = ()
    """Roles that are read where they exist."""
    losses: tuple[LossName, ...] = ("response",)
    """Losses that its samples can have, the automatic one first."""


ROWS_TOGETHER = 256
"""Rows that are read from the data set at a time."""

CHAT = ("tools", "chat_template_kwargs")
REFERENCE = ("reference_chosen", "reference_rejected")

FORMATS = {
    "rollouts": Format(("prompt", "completions", "advantages"), CHAT, ("policy-gradient",)),
    "rollout": Format(("prompt", "completion", "advantage"), CHAT, ("policy-gradient",)),
    "preference": Format(("chosen", "rejected"), ("prompt", *REFERENCE, *CHAT), ("dpo", "chosen", "rejected")),
    "prompt-completion": Format(("prompt", "completion"), CHAT),
    "messages": Format(("messages",), CHAT),
    "instruction": Format(("instruction", "output"), ("input",)),
    "text": Format(("text",)),
}
"""The formats, in the order in which they are recognized."""

ALIASES = {
    "conversations": "messages",
    "ref_chosen_logps": "reference_chosen",
    "ref_rejected_logps": "reference_rejected",
    "reference_chosen_logps": "reference_chosen",
    "reference_rejected_logps": "reference_rejected",
}
"""Column names of other habits that hold a role."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps the parts of a sample, and what the loss is made of them."""

    format: str
    """One of `FORMATS`."""
    loss: LossName
    """Never `auto`."""
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
        return f"{self.format}: " + ", ".join(parts) + f"; loss = {self.loss}"

    def rows(self, dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
        """Contents by role, row after row.

        Args:
            dataset: the data set.
        """
        names = list(self.columns.values())
        columns = dataset.select_columns(list(dict.fromkeys(names)))
        if columns.format["type"] != "custom":  # a transform makes the contents, a format only their types
            columns = columns.with_format(None)
        # one row at a time would take ten times as long to read
        for batch in columns.iter(batch_size=ROWS_TOGETHER):
            assert isinstance(batch, Mapping)
            for values in zip(*(batch[column] for column in names), strict=True):
                yield dict(zip(self.columns, values, strict=True))


def without_failure(loss: LossName) -> tuple[str, ...]:
    """Statuses that are no failure under a loss: equal sides of a pair and equal rollouts of a group have nothing to teach.

    Args:
        loss: of the samples.
    """
    return ("ok", "zero_gradient") if loss in ("dpo", "policy-gradient") else ("ok",)


def recognize(columns: Sequence[str], config: ScoreConfig) -> Layout:
    """Match a data set's columns with the formats.

    Args:
        columns: the data set's column names.
        config: format, loss and columns that the user set win over recognition.

    Returns:
        The layout; the first format of `FORMATS` that has the loss and whose columns are all there when the format is
        automatic.

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
                DataError(
                    f"{setting}: the data set has no column {column!r}",
                    allowed=", ".join(columns),
                    fix=did_you_mean(column, columns) or "name another column",
                )
            )
    raise_all(problems)
    candidates = _candidates(config)
    matching = [name for name in candidates if all(role in by_role for role in FORMATS[name].required)]
    if not matching:
        raise DataError(
            "the columns fit no format" if config.format == "auto" else f"columns of format {config.format} are missing",
            got="columns " + ", ".join(columns),
            allowed=" | ".join(" + ".join(FORMATS[name].required) for name in candidates),
            fix="say which column holds what, for example --columns prompt=question completion=answer",
        )  # fmt: skip
    found = FORMATS[matching[0]]
    return Layout(
        format=matching[0],
        loss=found.losses[0] if config.loss == "auto" else config.loss,
        columns={role: by_role[role] for role in (*found.required, *found.optional) if role in by_role},
        id_column=config.id_column,
        source_column=config.source_column or ("source" if "source" in columns else None),
    )


def _candidates(config: ScoreConfig) -> list[str]:
    """Formats that the settings leave possible."""
    with_loss = [name for name, kind in FORMATS.items() if config.loss == "auto" or config.loss in kind.losses]
    if config.format == "auto":
        return with_loss
    if config.format not in with_loss:
        raise DataError(
            f"rows of format {config.format} have no {config.loss} loss", got=f"--loss {config.loss}",
            allowed=", ".join(FORMATS[config.format].losses), fix="leave --loss out",
        )  # fmt: skip
    return [config.format]
