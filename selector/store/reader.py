"""Open a feature store: its manifest, its columns as arrays, and its shards one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32

from selector.errors import StoreError
from selector.store.schema import Manifest
from selector.store.verify import inspect, shard_files, shard_owner
from selector.types import LayerSpec


def feature_matrix(column: pa.ChunkedArray, width: int) -> Float32[np.ndarray, "N F"]:
    """Values of one measure's column, NaN where there is none.

    Args:
        column: the column of a shard, fixed-size lists of floats.
        width: length of the lists.
    """
    lists = column.combine_chunks()
    if lists.null_count:
        # a null list hides child values of its own, so it is filled before its values are taken
        lists = pc.fill_null(lists, pa.scalar([float("nan")] * width, type=lists.type))
    values = lists.flatten()
    if values.null_count:
        values = pc.fill_null(values, float("nan"))
    return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, width)


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
        return shard_files(self.path)

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
                raise StoreError(
                    f"shard {path.name} cannot be read", got=error, fix=f"run `selector verify {self.path} --repair`"
                ) from error
            owner = shard_owner(table.schema)
            if owner.get("store") != self.manifest.fingerprint:
                raise StoreError(
                    f"shard {path.name} belongs to another store", got=owner.get("store"), allowed=self.manifest.fingerprint,
                    fix=f"run `selector verify {self.path} --repair`",
                )  # fmt: skip
            yield table.replace_schema_metadata(None)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Whole store as one Arrow table, ordered by row.

        Args:
            columns: which columns to read; all when None.
        """
        wanted = list(columns) if columns is not None else self.manifest.schema.names
        tables = list(self.shards(list(dict.fromkeys([*wanted, "row"]))))
        if not tables:
            return self.manifest.schema.empty_table().select(wanted)
        table = pa.concat_tables(tables)
        return table.take(pc.sort_indices(table, sort_keys=[("row", "ascending")])).select(wanted)  # pyright: ignore[reportAttributeAccessIssue]

    def features(self, measure: str) -> Float32[np.ndarray, "N F"]:
        """One measure of every sample and layer, in rows of the data set; NaN where there is none.

        Args:
            measure: one of `selector.types.MEASURES`.

        Raises:
            StoreError: the store was made without spectra.
        """
        if not self.layers:
            raise StoreError(
                f"{self.path} holds no spectra", got="scores of forward passes alone",
                fix="score into another directory with spectra among --with",
            )  # fmt: skip
        return feature_matrix(self.to_arrow([measure])[measure], len(self.layers))

    @cached_property
    def ids(self) -> np.ndarray:
        """Sample ids [N] in rows of the data set."""
        return self.to_arrow(["sample_id"])["sample_id"].to_numpy()

    def __len__(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.shard_paths())

    def sketches(self) -> Float32[np.ndarray, "N F d"]:
        """Sketch of every sample's gradients, layer by layer, in rows of the data set and the gradient's unit; NaN where there is none.

        Raises:
            StoreError: the store was made without sketches.
        """
        dimension = self.manifest.identity.get("sketch_dimension", 0)
        if not dimension:
            raise StoreError(
                f"{self.path} holds no sketches",
                fix="score into another directory with --sketch-dimension 16, or another square",
            )
        table = self.to_arrow(["sketch", "sketch_scale"])
        width = len(self.layers)
        values = feature_matrix(table["sketch"], width * dimension).reshape(-1, width, dimension)
        return values * feature_matrix(table["sketch_scale"], width)[..., None]

    def verify(self) -> list[StoreError]:
        """Check every file of the store, and the samples against each other.

        Returns:
            What is wrong, file by file; empty for a whole and sound store.
        """
        return [damage.error for damage in inspect(self.path)[1]]
