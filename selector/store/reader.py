"""Open a feature store: its manifest, its columns as arrays, its shards one by one, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32

from selector.errors import StoreError
from selector.store.schema import METADATA_KEY, SHARDS, Manifest, shard_schema
from selector.types import LayerSpec


def feature_matrix(column: pa.ChunkedArray, width: int) -> Float32[np.ndarray, "N F"]:
    """Values of one measure's column, NaN where there is none.

    Args:
        column: the column of a shard, fixed-size lists of float32.
        width: length of the lists.
    """
    lists = column.combine_chunks()
    if lists.null_count:
        # a null list hides child values of its own, so it is filled before its values are taken
        lists = pc.fill_null(lists, pa.scalar([float("nan")] * width, type=lists.type))
    return pc.fill_null(lists.flatten(), float("nan")).to_numpy(zero_copy_only=False).reshape(-1, width)


class FeatureStore:
    """Features of a data set's samples, as `selector score` left them. Open one with `FeatureStore.open`.

    Rows come in the order of the data set, whatever ranks wrote them.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open a store for reading.

        Args:
            path: the store's directory.

        Raises:
            StoreError: there is no store, or its manifest is damaged or of another format.
        """
        return cls(Path(path), Manifest.load(Path(path)))

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layer table: what each entry of a feature list belongs to."""
        return self.manifest.layers

    def shard_paths(self) -> list[Path]:
        """Files of the shards, in a fixed order."""
        return sorted((self.path / SHARDS).glob("*.parquet"))

    def shards(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Read shard after shard, for work that must not hold the whole store.

        Args:
            columns: which columns to read; all when None.

        Raises:
            StoreError: a shard cannot be read or belongs to another store.
        """
        for path in self.shard_paths():
            try:
                table = pq.read_table(path, columns=list(columns) if columns is not None else None)
            except (pa.ArrowInvalid, OSError) as error:
                raise StoreError(f"shard {path.name} cannot be read", got=error, fix=f"run `selector verify {self.path}`") from error
            problem = self._foreign(path, table.schema)
            if problem is not None:
                raise problem
            yield table.replace_schema_metadata(None)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Whole store as one Arrow table, ordered by row.

        Args:
            columns: which columns to read; all when None.
        """
        wanted = list(columns) if columns is not None else shard_schema(len(self.layers)).names
        tables = list(self.shards(list(dict.fromkeys([*wanted, "row"]))))
        if not tables:
            return shard_schema(len(self.layers)).empty_table().select(wanted)
        table = pa.concat_tables(tables)
        return table.take(pc.sort_indices(table, sort_keys=[("row", "ascending")])).select(wanted)

    def features(self, measure: str) -> Float32[np.ndarray, "N F"]:
        """One measure of every sample and layer, in rows of the data set; NaN where there is none.

        Args:
            measure: one of `selector.types.MEASURES`.
        """
        return feature_matrix(self.to_arrow([measure])[measure], len(self.layers))

    @cached_property
    def ids(self) -> np.ndarray:
        """Sample ids [N] in rows of the data set."""
        return self.to_arrow(["sample_id"])["sample_id"].to_numpy()

    def __len__(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.shard_paths())

    def verify(self) -> list[StoreError]:
        """Check every shard's bytes against its name, its owner, and the samples against each other.

        Returns:
            What is wrong, shard by shard; empty for a whole and sound store.
        """
        problems: list[StoreError] = []
        ids: Counter[str] = Counter()
        expected = shard_schema(len(self.layers))
        present = set()
        for path in self.shard_paths():
            present.add(path.name)
            repair = f"remove it and run the same `selector score` command again: it scores what is missing ({path})"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if path.stem.split("-")[-1] != digest:
                problems.append(StoreError(f"shard {path.name} is damaged", got=f"checksum {digest}", allowed=path.stem.split("-")[-1], fix=repair))
                continue
            table = pq.read_table(path)
            foreign = self._foreign(path, table.schema)
            if foreign is not None:
                problems.append(foreign)
            elif not table.schema.remove_metadata().equals(expected):
                problems.append(StoreError(f"shard {path.name} has other columns", got=table.schema.names, allowed=expected.names, fix=repair))
            else:
                ids.update(table["sample_id"].to_pylist())
        for name in sorted(set(self.manifest.shards) - present):
            problems.append(StoreError(f"shard {name} is missing", fix="run the same `selector score` command again"))
        doubled = [sample_id for sample_id, count in ids.items() if count > 1]
        if doubled:
            problems.append(StoreError(f"{len(doubled)} samples are stored twice", got=", ".join(doubled[:5]), allowed="each sample once"))
        if not problems and len(ids) < self.manifest.expected:
            problems.append(
                StoreError("the store is unfinished", got=f"{len(ids)} samples", allowed=self.manifest.expected,
                           fix="run the same `selector score` command again")
            )  # fmt: skip
        return problems

    def _foreign(self, path: Path, schema: pa.Schema) -> StoreError | None:
        owner = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")).get("store")
        if owner == self.manifest.fingerprint:
            return None
        return StoreError(f"shard {path.name} belongs to another store", got=owner, allowed=self.manifest.fingerprint, fix=f"move it away ({path})")
