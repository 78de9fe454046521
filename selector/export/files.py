"""Write the picked rows, best first, for the tool that comes next.

    jsonl · parquet · datasets     all columns of the data set, and `selector_id`, `_score`, `_weight`, `_reason`
    index                          no content: position, id, score and weight of each row, as CSV
    trl · llama-factory · axolotl · ms-swift · verl
                                   what the framework documents, with the settings that name it (`frameworks`)

Every file is written under a temporary name and renamed, so that none is ever half there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow import csv

from selector.config import ScoreConfig
from selector.data.layout import recognize
from selector.errors import ConfigError, SelectionError, did_you_mean
from selector.export.frameworks import FRAMEWORKS
from selector.selection import Selection

if TYPE_CHECKING:
    import datasets

PLAIN = ("jsonl", "parquet", "datasets", "index")
KINDS = (*PLAIN, *FRAMEWORKS)
"""What a selection can be exported as."""
BATCH = 1000
"""Rows that are converted at a time."""


def export(
    selection: Selection,
    dataset: datasets.Dataset,
    out: str | Path,
    kind: str = "jsonl",
    *,
    ids: Sequence[str] | None = None,
    config: ScoreConfig | None = None,
) -> list[Path]:
    """Write the picked rows of a data set.

    Args:
        selection: the picked samples.
        dataset: the data set that was scored.
        out: a directory, made when missing; files of the same names are replaced.
        kind: one of `KINDS`.
        ids: [N] the sample id of each row of the data set; positions are used when None.
        config: says which column holds what, for a framework; recognized by the column names when None.

    Returns:
        The files that were written.

    Raises:
        ConfigError: an unknown kind.
        SelectionError: picked samples are not in the data set, or its rows are of a sort that the framework cannot read.
        DataError: its columns fit no format.
    """
    if kind not in KINDS:
        raise ConfigError(
            "unknown kind of export", got=kind, allowed=", ".join(KINDS), fix=did_you_mean(kind, KINDS) or None
        )
    subset = selection.apply(dataset, ids)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "index":
        return [_write(out / "index.csv", lambda path: csv.write_csv(_index(selection), path))]
    if kind == "datasets":
        return [_write(out / "data", lambda path: subset.save_to_disk(str(path)))]
    if kind == "parquet":
        return [_write(out / "data.parquet", lambda path: subset.to_parquet(str(path)))]
    if kind == "jsonl":
        return [_write(out / "data.jsonl", lambda path: _write_lines(path, _rows(subset)))]
    layout = recognize(dataset.column_names, config or ScoreConfig())
    framework = FRAMEWORKS[kind]
    if layout.format not in framework.formats:
        allowed = ", ".join(framework.formats)
        raise SelectionError(
            f"rows of format {layout.format} cannot be exported for {kind}", got=layout.format, allowed=allowed
        )
    sources = subset[layout.source_column] if layout.source_column else [""] * len(subset)
    about = zip(selection.ids.tolist(), selection.scores.tolist(), selection.weights.tolist(), sources, strict=True)
    rows = (framework.convert(row, _about(*one)) for row, one in zip(layout.rows(subset), about, strict=True))
    if framework.parquet:
        data = _write(out / "data.parquet", lambda path: _write_parquet(path, rows))
    else:
        data = _write(out / "data.jsonl", lambda path: _write_lines(path, rows))
    written = [data]
    for name, settings in framework.settings(layout.format, data.name).items():
        content = (
            json.dumps(settings, indent=1) + "\n"
            if name.endswith(".json")
            else yaml.safe_dump(settings, sort_keys=False)
        )
        written.append(_write(out / name, lambda path, content=content: path.write_text(content, encoding="utf-8")))
    return written


def _about(sample_id: str, score: float, weight: float, source: str | None) -> dict[str, Any]:
    return {
        "selector_id": sample_id,
        "selector_score": _number(score),
        "selector_weight": weight,
        "source": source or "",
    }


def _index(selection: Selection) -> pa.Table:
    columns = {"row": selection.rows, "sample_id": pa.array(selection.ids, pa.string())}
    scores = pa.array(selection.scores, pa.float64(), from_pandas=True)
    return pa.table({**columns, "score": scores, "weight": selection.weights})


def _rows(subset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for row in subset:
        assert isinstance(row, Mapping)
        yield {**row, "selector_score": _number(row["selector_score"])}


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or math.isnan(value) else value


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    table = pa.Table.from_pylist([dict(row) for row in rows])
    pq.write_table(table, path)


def _write(path: Path, writer: Callable[[Path], object]) -> Path:
    """Let a writer fill a temporary file or folder, then give it its name."""
    with _temporary(path) as temporary:
        writer(temporary)
    return path


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
