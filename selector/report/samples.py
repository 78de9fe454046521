"""The samples that a report shows one by one, with their texts: best, worst, at the border, and without a score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from selector.config import ScoreConfig, from_mapping
from selector.data.ids import content_hash
from selector.data.layout import recognize
from selector.data.rollouts import one_row_per_rollout
from selector.errors import DataError
from selector.report.shapes import forms
from selector.scores.statistics import mean_ranks
from selector.selection import Selection
from selector.store.schema import Manifest
from selector.types import Scores

if TYPE_CHECKING:
    import datasets

SHOWN = 10
"""Samples of each kind."""
CHARACTERS = 4000
"""Longest text that is shown of one part of a sample."""

PART = pa.struct([("role", pa.string()), ("text", pa.string())])


class Texts:
    """Texts of single samples out of the data set that was scored.

    Args:
        dataset: the rows, as they were scored.
        manifest: of the store, which says how they were read.

    Raises:
        DataError: the columns do not fit.
    """

    def __init__(self, dataset: datasets.Dataset, manifest: Manifest) -> None:
        known = {field.name for field in fields(ScoreConfig)}
        config = from_mapping(
            ScoreConfig, {k: v for k, v in manifest.identity.items() if k in known}, "the store's manifest"
        )
        rollouts = recognize(dataset.column_names, ScoreConfig()) if config.unit == "rollout" else None
        if rollouts is not None and rollouts.format == "rollouts":
            dataset = one_row_per_rollout(dataset, rollouts)
        self._dataset, self._layout = dataset, recognize(dataset.column_names, config)

    def __call__(self, row: int, sample_id: str) -> list[dict[str, str]]:
        """The parts of a sample, each a role and a text.

        Args:
            row: its position in the data set.
            sample_id: its id, which must be found there.

        Raises:
            DataError: the data set holds another sample in this row.
        """
        if row >= len(self._dataset):
            raise _other_data(sample_id, row, f"{len(self._dataset)} rows")
        one = self._dataset.select([row])
        (contents,) = self._layout.rows(one)
        found = str(one[0][self._layout.id_column]) if self._layout.id_column else content_hash(contents)
        if found != (sample_id if self._layout.id_column else sample_id.rsplit("-", 1)[0]):
            raise _other_data(sample_id, row, found)
        return [{"role": role, "text": text} for role, value in contents.items() for role, text in parts(role, value)]


def _other_data(sample_id: str, row: int, got: str) -> DataError:
    return DataError(
        "this is not the data set that was scored", got=f"row {row} is {got}", allowed=sample_id,
        fix="name the file that `selector score` read, unchanged, with --data",
    )  # fmt: skip


def parts(role: str, value: Any) -> list[tuple[str, str]]:
    """The texts in one column of a row: a string, a conversation, or a list of either.

    Args:
        role: what the column holds.
        value: its content.
    """
    if value is None or value == []:
        return []
    if isinstance(value, str):
        return [(role, value)]
    if isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value):
        return [(f"{role}: {m['role']}", said) for m in value for _, said in parts(role, m.get("content"))]
    if isinstance(value, list) and all(isinstance(item, str | list) for item in value):
        return [(f"{name} {i}", text) for i, item in enumerate(value, 1) for name, text in parts(role, item)]
    return [(role, json.dumps(value, ensure_ascii=False, default=str))]


def samples_table(
    scores: Scores, samples: pa.Table, selections: Mapping[str, Selection], texts: Texts | None
) -> pa.Table:
    """The samples that are shown, each once.

    Args:
        scores: what was selected by.
        samples: sample_id, row, status, loss of every sample of the store, in the order of the scores.
        selections: by name; the border is that of the first one.
        texts: where texts come from; they are left out when None.

    Returns:
        Columns kind (top, bottom, border, failed), sample_id, row, source, n_tokens, n_loss_tokens, status, loss, raw,
        controlled, raw_percentile and percentile (share of the pool below, 0 to 100), picked_by, reason, parts.
    """
    status = np.array(samples["status"].to_pylist(), dtype=object)
    loss = pc.fill_null(samples["loss"].cast(pa.float64()), float("nan")).to_numpy()
    values = forms(scores)
    percentiles = {form: _percentiles(values[form]) for form in values}
    by_row = {
        name: dict(zip(selection.rows.tolist(), selection.reasons.tolist(), strict=True))
        for name, selection in selections.items()
    }
    records = []
    for kind, at in _chosen(scores, status, next(iter(selections.values()), None)):
        for i in at.tolist():
            row, sample_id = int(scores.rows[i]), str(scores.ids[i])
            picked_by = [name for name, reasons in by_row.items() if row in reasons]
            records.append(
                {
                    "kind": kind, "sample_id": sample_id, "row": row, "source": str(scores.source[i]),
                    "n_tokens": int(scores.n_tokens[i]), "n_loss_tokens": int(scores.n_loss_tokens[i]),
                    "status": str(status[i]), "loss": _number(loss, i),
                    "raw": _number(values["raw"], i), "controlled": _number(values["controlled"], i),
                    "raw_percentile": _number(percentiles["raw"], i), "percentile": _number(percentiles["controlled"], i),
                    "picked_by": picked_by, "reason": by_row[picked_by[0]][row] if picked_by else None,
                    "parts": [{"role": p["role"], "text": _cut(p["text"])} for p in texts(row, sample_id)] if texts else [],
                }
            )  # fmt: skip
    return pa.Table.from_pylist(records, schema=_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("kind", pa.string()), ("sample_id", pa.string()), ("row", pa.int64()), ("source", pa.string()),
        ("n_tokens", pa.int64()), ("n_loss_tokens", pa.int64()), ("status", pa.string()),
        *((name, pa.float64()) for name in ("loss", "raw", "controlled", "raw_percentile", "percentile")),
        ("picked_by", pa.list_(pa.string())), ("reason", pa.string()), ("parts", pa.list_(PART)),
    ]
)  # fmt: skip


def _chosen(scores: Scores, status: np.ndarray, selection: Selection | None) -> list[tuple[str, Int[np.ndarray, " _"]]]:
    """Positions of the samples of each kind; a sample belongs to the first kind that takes it."""
    scored = np.flatnonzero(np.isfinite(scores.values))
    best = scored[np.argsort(-scores.values[scored], kind="stable")]
    found: list[tuple[str, Int[np.ndarray, " _"]]] = []
    if selection is not None:
        inside = np.isin(scores.rows[best], selection.rows)
        border = np.concatenate([best[inside][-SHOWN // 2 :], best[~inside][: SHOWN // 2]])
        found = [("top", best[:SHOWN]), ("border", border), ("bottom", best[::-1][:SHOWN])]
    else:
        found = [("top", best[:SHOWN]), ("bottom", best[::-1][:SHOWN])]
    found.append(("failed", np.flatnonzero(status != "ok")[:SHOWN]))
    taken: set[int] = set()
    unique = []
    for kind, at in found:
        new = [i for i in at.tolist() if i not in taken]
        taken.update(new)
        unique.append((kind, np.array(new, dtype=np.int64)))
    return unique


def _percentiles(values: np.ndarray) -> np.ndarray:
    found = np.full(len(values), np.nan)
    scored = np.isfinite(values)
    found[scored] = 100 * (mean_ranks(values[scored]) - 0.5) / max(int(scored.sum()), 1)
    return found


def _number(values: np.ndarray, at: int) -> float | None:
    value = float(values[at])
    return value if np.isfinite(value) else None


def _cut(text: str) -> str:
    left = len(text) - CHARACTERS
    return text if left <= 0 else f"{text[:CHARACTERS]} [… {left:,} more characters]"
