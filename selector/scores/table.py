"""`scores.parquet`: the compact table from which selection among tens of millions reads.

    sample_id       string              row        int64
    source          dictionary<string>  n_tokens   int32      n_loss_tokens   int32
    <name>          float64             the score to select by, null where a sample has none
    <name>.raw      float64             the same before length control

One pair of columns per score. The Parquet metadata holds each score's provenance, and with it the fit of its length
control, as JSON. Rows keep the order of the data set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selector.errors import SelectionError, did_you_mean
from selector.store.schema import METADATA_KEY
from selector.store.writer import write_atomically
from selector.types import Scores

FORMAT = "selector-scores"
FORMAT_VERSION = 1
ROW_GROUP = 1 << 18


def write_scores(path: str | Path, scores: Mapping[str, Scores]) -> None:
    """Write scores of one pool as one table.

    Args:
        path: the file, replaced when it exists.
        scores: scores by name, all of the same samples in the same order.

    Raises:
        SelectionError: there are none, or they are of different samples.
    """
    if not scores:
        raise SelectionError("no scores to write", allowed="one or more")
    first = next(iter(scores.values()))
    for name, other in scores.items():
        if other.ids is not first.ids and not np.array_equal(other.ids, first.ids):
            raise SelectionError(
                f"the score {name!r} is of other samples",
                got=f"{len(other)} samples",
                allowed="the same ids in the same order",
            )
    columns: dict[str, Any] = {
        "sample_id": pa.array(first.ids, pa.string()),
        "row": pa.array(first.rows, pa.int64()),
        "source": pa.array(first.source, pa.string()).dictionary_encode(),
        "n_tokens": pa.array(first.n_tokens, pa.int32()),
        "n_loss_tokens": pa.array(first.n_loss_tokens, pa.int32()),
    }
    for name, one in scores.items():
        columns[name] = pa.array(one.values, pa.float64(), from_pandas=True)
        columns[f"{name}.raw"] = pa.array(one.raw, pa.float64(), from_pandas=True)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "scores": {name: one.provenance for name, one in scores.items()},
    }
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(metadata, ensure_ascii=False).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_provenance(path: str | Path) -> dict[str, dict[str, Any]]:
    """Names and provenance of the scores in a table.

    Args:
        path: the file.

    Raises:
        SelectionError: there is no such file, or it holds no scores of this format version.
    """
    try:
        metadata = json.loads((pq.read_schema(path).metadata or {})[METADATA_KEY])
        found, names = (metadata["format"], metadata["format_version"]), metadata["scores"]
    except (OSError, pa.ArrowInvalid, KeyError, json.JSONDecodeError) as error:
        raise SelectionError(
            f"{path} is no table of scores", got=repr(error), fix="make one with `selector select`"
        ) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise SelectionError(f"{path} has another format", got=found, allowed=(FORMAT, FORMAT_VERSION))
    return names


def read_scores(path: str | Path, name: str | None = None) -> Scores:
    """Read one score of a table.

    Args:
        path: the file.
        name: which score; the first when None.

    Raises:
        SelectionError: the file holds no scores, or none of that name.
    """
    provenance = read_provenance(path)
    name = resolve_name(provenance, name)
    table = pq.read_table(
        path, columns=["sample_id", "row", "source", "n_tokens", "n_loss_tokens", name, f"{name}.raw"]
    )
    return to_scores(table, name, provenance[name])


def to_scores(table: pa.Table, name: str, provenance: dict[str, Any]) -> Scores:
    """Scores from rows of a table.

    Args:
        table: the columns of one score.
        name: the score.
        provenance: where it comes from.
    """
    return Scores(
        ids=table["sample_id"].to_numpy(),
        rows=table["row"].to_numpy(),
        values=pc.fill_null(table[name], float("nan")).to_numpy(),
        raw=pc.fill_null(table[f"{name}.raw"], float("nan")).to_numpy(),
        n_tokens=table["n_tokens"].to_numpy(),
        n_loss_tokens=table["n_loss_tokens"].to_numpy(),
        source=table["source"].cast(pa.string()).to_numpy(),
        provenance=provenance,
    )


def resolve_name(provenance: Mapping[str, Any], name: str | None) -> str:
    """The name of a score in a table, which must be there; the first when None."""
    if name is None:
        return next(iter(provenance))
    if name not in provenance:
        raise SelectionError(
            "the table has no such score",
            got=name,
            allowed=", ".join(provenance),
            fix=did_you_mean(name, provenance) or None,
        )
    return name
