"""A selection: which samples to train on, in which order, with which weights, and why.

On disk it is one Parquet file, one row per picked sample, whose metadata holds the provenance as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from selector.errors import SelectionError
from selector.store.schema import METADATA_KEY
from selector.store.writer import write_atomically

if TYPE_CHECKING:
    import datasets

FORMAT = "selector-selection"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Selection:
    """Picked samples, best first."""

    ids: np.ndarray
    """[K] str, unique."""
    rows: Int[np.ndarray, " K"]
    """Position of each sample in the data set that was scored."""
    weights: Float[np.ndarray, " K"]
    """Sampling weights > 0; all one unless the policy weighs."""
    scores: Float[np.ndarray, " K"]
    """The score of each sample; NaN where the policy needs none."""
    n_tokens: Int[np.ndarray, " K"]
    """Tokens that a training step spends on each sample."""
    reasons: np.ndarray
    """[K] str: why each sample was picked."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Store, scores, policy, budget, seed and versions that made the selection."""

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("ids", "rows", "weights", "scores", "n_tokens", "reasons")
        }
        if len(set(lengths.values())) > 1:
            raise SelectionError("the columns of a selection differ in length", got=lengths)
        if len(set(self.ids.tolist())) < len(self.ids):
            raise SelectionError(
                "a selection names a sample twice",
                got=f"{len(self.ids)} picks",
                allowed="each id once; use weights to repeat a sample",
            )
        if len(self.weights) and not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
            raise SelectionError(
                "weights must be finite and positive", got=f"smallest {self.weights.min()}", allowed="> 0"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: str | Path) -> None:
        """Write the selection as one Parquet file.

        Args:
            path: the file, replaced when it exists.
        """
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "provenance": self.provenance}
        table = pa.table(
            {
                "sample_id": pa.array(self.ids.tolist(), pa.string()),
                "row": pa.array(self.rows, pa.int64()),
                "weight": pa.array(self.weights, pa.float64()),
                "score": pa.array(self.scores, pa.float64(), from_pandas=True),
                "n_tokens": pa.array(self.n_tokens, pa.int64()),
                "reason": pa.array(self.reasons.tolist(), pa.string()),
            }
        ).replace_schema_metadata({METADATA_KEY: json.dumps(metadata, ensure_ascii=False).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read a selection that `save` wrote.

        Args:
            path: the file.

        Raises:
            SelectionError: there is no such file, or it holds no selection of this format version.
        """
        try:
            table = pq.read_table(path)
            metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
            found = (metadata["format"], metadata["format_version"])
        except (OSError, pa.ArrowInvalid, KeyError, json.JSONDecodeError) as error:
            raise SelectionError(
                f"{path} is no selection", got=repr(error), fix="make one with `selector select`"
            ) from error
        if found != (FORMAT, FORMAT_VERSION):
            raise SelectionError(f"{path} has another format", got=found, allowed=(FORMAT, FORMAT_VERSION))
        return cls(
            ids=table["sample_id"].to_numpy(),
            rows=table["row"].to_numpy(),
            weights=table["weight"].to_numpy(),
            scores=table["score"].to_numpy(),
            n_tokens=table["n_tokens"].to_numpy(),
            reasons=table["reason"].to_numpy(),
            provenance=metadata["provenance"],
        )

    def apply(self, dataset: datasets.Dataset, ids: Sequence[str] | None = None) -> datasets.Dataset:
        """Take the picked rows of a data set, in the order of the selection, with columns that say why.

        Args:
            dataset: the data set that was scored, its rows unchanged; or any data set together with `ids`.
            ids: [N] the sample id of each row of `dataset`; positions are used when None.

        Returns:
            The subset, with the added columns `selector_id`, `selector_score`, `selector_weight` and `selector_reason`.

        Raises:
            SelectionError: picked samples are missing from the data set.
        """
        if ids is None:
            rows = self.rows
            missing = [str(i) for i, row in zip(self.ids, rows, strict=True) if row >= len(dataset)]
        else:
            position = {sample_id: i for i, sample_id in enumerate(ids)}
            missing = [str(i) for i in self.ids if i not in position]
            rows = np.array([position.get(i, -1) for i in self.ids], dtype=np.int64)
        if missing:
            raise SelectionError(
                f"{len(missing)} picked samples are not in the data set", got=", ".join(missing[:5]),
                allowed="the data set that was scored", fix="load the same file, or pass the ids of its rows",
            )  # fmt: skip
        subset = dataset.select(rows.tolist())
        columns = {"id": self.ids, "score": self.scores, "weight": self.weights, "reason": self.reasons}
        for name, values in columns.items():
            subset = subset.add_column(f"selector_{name}", values.tolist())  # pyright: ignore[reportCallIssue]
        return subset
