"""Scores of all rows of the contrasts under one model: from a feature store to one compact table, and length control on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from contrasts import Row
from selector import FeatureStore, ScoreConfig, score, score_dataset
from selector.scores import Aggregation
from selector.scores.from_store import FROM_SPECTRA, UNCONTROLLED, available
from selector.scores.length import control_class

FORWARD = ("ifd", "hidden_effective_rank", "angle_concentration", "logit_nuclear_norm")
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
PARTS = {
    "": Aggregation(), "attention": Aggregation(projections=ATTENTION), "mlp": Aggregation(projections=MLP),
    **{projection: Aggregation(projections=(projection,)) for projection in (*ATTENTION, *MLP)},
    "early": Aggregation(depth=(0.0, 0.33)), "middle": Aggregation(depth=(0.34, 0.66)), "late": Aggregation(depth=(0.67, 1.0)),
}  # fmt: skip
"""Parts of the layer table; the empty name is the whole of it."""
CONTROLS = ("none", "spline", "bins", "per-token")
MAX_LENGTH = 768
"""Tokens; longer rows lose the end of their completion."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of rows under one model."""

    model: str
    ids: np.ndarray
    prompt_tokens: Int[np.ndarray, " N"]
    response_tokens: Int[np.ndarray, " N"]
    raw: dict[str, Float[np.ndarray, " N"]]
    """Scores before control, by name: `measure` or `measure, part`."""

    def at(self, rows: Sequence[Row]) -> Int[np.ndarray, " M"]:
        """Position of each row."""
        position = {name: i for i, name in enumerate(self.ids.tolist())}
        return np.array([position[row.id] for row in rows], dtype=np.int64)

    def controlled(self, name: str, control: str, pools: Sequence[Int[np.ndarray, " M"]]) -> Float[np.ndarray, " N"]:
        """A score with length taken out, fitted on each pool by itself and without labels.

        Args:
            name: the score.
            control: one of `CONTROLS`.
            pools: positions of the rows of each pool.
        """
        raw = self.raw[name]
        if control == "none" or name in UNCONTROLLED:
            return raw
        values = np.full(len(raw), np.nan)
        for pool in pools:
            own = raw[pool], self.prompt_tokens[pool], self.response_tokens[pool]
            values[pool] = control_class(control).fit(*own).apply(*own)
        return values

    def lengths(self) -> Float[np.ndarray, "N 2"]:
        """Log tokens of prompt and completion."""
        return np.log1p(np.stack([self.prompt_tokens, self.response_tokens], axis=1))

    def save(self, path: Path) -> None:
        """Write one small Parquet file."""
        columns = {name: pa.array(values, pa.float32(), from_pandas=True) for name, values in self.raw.items()}
        lengths = {"prompt_tokens": self.prompt_tokens, "response_tokens": self.response_tokens}
        table = pa.table(
            {"id": pa.array(self.ids, pa.string()), **{k: pa.array(v, pa.int32()) for k, v in lengths.items()}}
        )
        for name, values in columns.items():
            if name not in lengths:
                table = table.append_column(name, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"model": self.model}), path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        ids, prompt, response = (columns.pop(name) for name in ("id", "prompt_tokens", "response_tokens"))
        raw = {name: values.astype(np.float64) for name, values in columns.items()}
        raw |= {"prompt_tokens": prompt.astype(np.float64), "response_tokens": response.astype(np.float64)}
        return cls((table.schema.metadata or {})[b"model"].decode(), ids.astype(str), prompt, response, raw)


def measure(
    model_folder: Path, name: str, rows: Sequence[Row], out: Path, scorers: Sequence[str], device: str
) -> Measured:
    """Score rows once, through the library, and aggregate every score that the claims look at.

    Args:
        model_folder: checkpoint.
        name: of the model, for tables.
        rows: what to score.
        out: the feature store, new or begun.
        scorers: of `ScoreConfig`.
        device: where the model runs.
    """
    from selector.scorer import load_model

    model, tokenizer = load_model(str(model_folder), "auto", device=device)
    dataset = datasets.Dataset.from_dict(
        {"id": [row.id for row in rows], "source": [row.pool for row in rows], "prompt": [f"{row.prompt}\n" for row in rows],
         "completion": [row.completion for row in rows]}
    )  # fmt: skip
    config = ScoreConfig(
        scorers=tuple(scorers), id_column="id", max_length=MAX_LENGTH, truncation="truncate-completion", max_failed=0.05
    )
    return aggregated(score_dataset(model, tokenizer, dataset, out, config), name)


def aggregated(store: FeatureStore, name: str) -> Measured:
    """Every score that a store has, of the whole model and of its parts."""
    raw: dict[str, Float[np.ndarray, " N"]] = {}
    for by in available(store):
        if by in ("perplexity", "layer_profile_difference") or by not in FROM_SPECTRA:
            parts = {"": PARTS[""]}
        else:
            parts = PARTS
        for part, aggregation in parts.items():
            found = score(store, by=by, control="none", aggregation=aggregation)
            raw[f"{by}, {part}" if part else by] = found.raw
    del raw["perplexity"]  # orders rows as loss does
    return Measured(name, found.ids.astype(str), found.n_tokens - found.n_loss_tokens, found.n_loss_tokens, raw)


def scored_by_all(measured: Measured) -> Bool[np.ndarray, " N"]:
    """Rows that have every score."""
    return np.all([np.isfinite(values) for values in measured.raw.values()], axis=0)
