"""Scores of all rows of the contrasts under one model: from a feature store to one compact table, and length control on it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contrasts import Row
from jaxtyping import Float, Int

from selector import FeatureStore, ScoreConfig, score, score_dataset
from selector.runtime import versions
from selector.scores import Aggregation
from selector.scores.from_store import FROM_SPECTRA, UNCONTROLLED, available
from selector.scores.length import control_class

SCORERS = ("spectra", "ifd", "hidden_effective_rank", "angle_concentration", "logit_nuclear_norm")
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
PARTS = {
    "": Aggregation(), "attention": Aggregation(projections=ATTENTION), "mlp": Aggregation(projections=MLP),
    **{projection: Aggregation(projections=(projection,)) for projection in (*ATTENTION, *MLP)},
    "early": Aggregation(depth=(0.0, 0.33)), "middle": Aggregation(depth=(0.34, 0.66)), "late": Aggregation(depth=(0.67, 1.0)),
}  # fmt: skip
"""Parts of the layer table; the empty name is the whole of it."""
CONTROLS = ("none", "spline", "bins", "per-token")
MAX_LENGTH = 1024
"""Tokens; longer rows lose the end of their completion."""
SUFFIX = ".scores.parquet"


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of rows under one model."""

    model: str
    ids: np.ndarray
    raw: dict[str, Float[np.ndarray, " N"]]
    """Scores before control, by name: `measure` or `measure, part`; lengths are among them. NaN where a row has none."""
    about: dict[str, Any]
    """Model, machine, versions and settings."""
    _controlled: dict[tuple[str, str, bytes], Float[np.ndarray, " N"]] = field(
        default_factory=dict, init=False, repr=False
    )

    def at(self, rows: Sequence[Row]) -> Int[np.ndarray, " M"]:
        """Position of each row."""
        position = {name: i for i, name in enumerate(self.ids.tolist())}
        return np.array([position[row.id] for row in rows], dtype=np.int64)

    def lengths(self) -> Int[np.ndarray, "N 2"]:
        """Tokens of prompt and completion; 0 where a row has no scores, whose length is not asked for."""
        lengths = np.stack([self.raw["prompt_tokens"], self.raw["response_tokens"]], axis=1)
        return np.nan_to_num(lengths).astype(np.int64)

    def controlled(self, name: str, control: str, pool: Int[np.ndarray, " M"]) -> Float[np.ndarray, " N"]:
        """A score with length taken out, fitted on a pool without labels; NaN outside the pool.

        Args:
            name: the score.
            control: one of `CONTROLS`.
            pool: positions of rows.
        """
        key = (name, control, pool.tobytes())
        if key not in self._controlled:
            kind = control_class("none" if name in UNCONTROLLED else control)
            prompt, response = self.lengths()[pool].T
            values = np.full(len(self.ids), np.nan)
            values[pool] = kind.fit(self.raw[name][pool], prompt, response).apply(
                self.raw[name][pool], prompt, response
            )
            self._controlled[key] = values
        return self._controlled[key]

    def save(self, path: Path) -> None:
        """Write one small Parquet file: a row id and one float32 per score, no text."""
        columns = {name: pa.array(values, pa.float32(), from_pandas=True) for name, values in self.raw.items()}
        table = pa.table({"id": pa.array(self.ids, pa.string()), **columns})
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {"model": self.model, "about": json.dumps(self.about)}
        pq.write_table(table.replace_schema_metadata(described), path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        raw = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names if name != "id"}
        described = table.schema.metadata
        ids = table["id"].to_numpy().astype(str)
        return cls(described[b"model"].decode(), ids, raw, json.loads(described[b"about"]))


def measure(model_folder: Path, name: str, rows: Path, store: Path, device: str) -> Measured:
    """Score rows once, through the library, and aggregate every score that the claims look at.

    Args:
        model_folder: checkpoint.
        name: of the model, for tables.
        rows: Parquet file of what to score.
        store: the feature store, new or begun.
        device: where the model runs.
    """
    from selector.data.load import load_rows
    from selector.scorer import load_model

    model, tokenizer = load_model(str(model_folder), device=device)
    config = ScoreConfig(
        scorers=SCORERS, id_column="id", source_column="source", max_length=MAX_LENGTH, truncation="truncate-completion",
        max_failed=0.05,
    )  # fmt: skip
    started = time.monotonic()
    found = score_dataset(model, tokenizer, load_rows(str(rows)), store, config)
    cuda = torch.device(device).type == "cuda"
    about = {
        "parameters": model.num_parameters(), "layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size, "dtype": str(model.dtype).removeprefix("torch."), "max_length": MAX_LENGTH,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "seconds of the last run": round(time.monotonic() - started, 1), "versions": versions(),
    }  # fmt: skip
    return aggregated(found, name, about)


def aggregated(store: FeatureStore, name: str, about: dict[str, Any]) -> Measured:
    """Every score that a store has, of the whole model and of its parts."""
    raw: dict[str, Float[np.ndarray, " N"]] = {}
    for by in available(store):
        if by == "perplexity":  # orders rows as loss does
            continue
        parts = PARTS if by in FROM_SPECTRA and by != "layer_profile_difference" else {"": PARTS[""]}
        for part, aggregation in parts.items():
            found = score(store, by=by, control="none", aggregation=aggregation)
            raw[f"{by}, {part}" if part else by] = found.raw
    table = store.to_arrow(["status", "truncated"])
    status, count = np.unique(table["status"].to_numpy(zero_copy_only=False).astype(str), return_counts=True)
    about |= {
        "status": dict(zip(status.tolist(), count.tolist(), strict=True)),
        "truncated": int(np.sum(table["truncated"].to_numpy())),
    }
    return Measured(name, found.ids.astype(str), raw, about)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Rows as a data set to score: the prompt ends in a newline, as in the papers."""
    columns = {
        "id": [row.id for row in rows], "source": [row.source for row in rows], "prompt": [f"{row.prompt}\n" for row in rows],
        "completion": [row.completion for row in rows],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19)
