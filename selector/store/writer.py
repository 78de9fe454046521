"""Write a feature store, one shard at a time; nothing that can be seen is ever half written.

Each rank owns a writer and names its shards by its rank, so no two ranks touch one file. Temporary files of a killed run
are removed when the next one starts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selector.config import save_yaml
from selector.errors import SelectorError, StoreError, raise_all
from selector.store import lineage
from selector.store.schema import CONFIG, MANIFEST, MANIFEST_BACKUP, QUARANTINE, SHARDS, Manifest, identity_conflicts

TEMPORARY = ".*.tmp-*"
"""Pattern of the names under which files are written before they are renamed."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it has the old or the new content whatever happens in between.

    Args:
        path: the file, replaced when it exists.
        content: its new bytes.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write both copies of the manifest, one after the other, so that a crash leaves at least one.

    Args:
        store: the store's directory.
        manifest: what they say.
    """
    for name in (MANIFEST, MANIFEST_BACKUP):
        write_atomically(store / name, manifest.to_json().encode())


def check(store: Path, manifest: Manifest, rows: Sequence[str] = (), append: bool = False) -> Manifest:
    """Make sure that a directory is free, or holds a store that this run may continue; nothing is written.

    Args:
        store: the store's directory.
        manifest: what the run would write.
        rows: one string for each row of the data set, as `lineage.begin` takes them; none where there is no data set.
        append: whether the data set may have grown since the store was begun.

    Returns:
        The manifest in force: the new one, with what an old one has recorded of the past.

    Raises:
        StoreError: the directory holds something else, or a store with another identity; all differences at once.
    """
    if (store / MANIFEST).exists() or (store / MANIFEST_BACKUP).exists():
        old = Manifest.load(store)
        problems: list[SelectorError] = []
        if old.data:
            manifest = replace(manifest, identity=manifest.identity | {"data": old.identity["data"]})
            try:
                manifest = replace(manifest, data=lineage.extend(store, old.data, rows, append))
            except StoreError as error:
                problems.append(error)
        raise_all([*problems, *identity_conflicts(store, old, manifest)])
        return replace(manifest, cost=old.cost, shards=old.shards, expected=max(old.expected, manifest.expected))
    if store.exists() and not (store.is_dir() and is_beginning(store)):
        raise StoreError(
            f"{store} is in use by something else",
            got="files that are no feature store",
            fix="choose an empty or new directory",
        )
    return manifest


def create(store: Path, manifest: Manifest) -> None:
    """Make a store's directories, clear what killed runs have left, and write settings and manifest.

    Args:
        store: the store's directory, which `check` has found fit.
        manifest: the manifest in force.
    """
    (store / SHARDS).mkdir(parents=True, exist_ok=True)
    for leftover in temporary_files(store):
        leftover.unlink(missing_ok=True)
    write_settings(store, manifest)
    write_manifest(store, manifest)


def write_settings(store: Path, manifest: Manifest) -> None:
    """Write the command that a manifest records where `selector run` finds it.

    Args:
        store: the store's directory.
        manifest: with the command; nothing is written when it has none.
    """
    if manifest.command:
        temporary = store / f".{CONFIG}.tmp-{os.getpid()}"
        save_yaml(temporary, manifest.command, f"replay with: selector run {store}")
        os.replace(temporary, store / CONFIG)


def temporary_files(store: Path) -> list[Path]:
    """What killed runs have left half written.

    Args:
        store: the store's directory.
    """
    return sorted(store.rglob(TEMPORARY))


def is_beginning(store: Path) -> bool:
    """Whether a directory is empty, or holds what a run leaves that is killed before it has written a manifest.

    Args:
        store: the directory.
    """
    entries = {entry.name for entry in store.iterdir() if not fnmatch(entry.name, TEMPORARY)}
    return entries <= {SHARDS, QUARANTINE, CONFIG} and (SHARDS in entries or not entries)


class StoreWriter:
    """Collects the rows of one rank and writes them as shards.

    Args:
        store: the store's directory, begun by `create`.
        manifest: the manifest in force.
        rank: the process's rank, part of its shards' names.
        shard_rows: rows per shard.
    """

    def __init__(self, store: Path, manifest: Manifest, *, rank: int = 0, shard_rows: int = 512) -> None:
        self.store, self.rank, self.shard_rows = store, rank, shard_rows
        self.schema = manifest.schema.with_metadata(manifest.shard_metadata)
        taken = [int(p.name.split("-")[1]) for p in (store / SHARDS).glob(f"{rank:05d}-*-*.parquet")]
        self._sequence = max(taken, default=-1) + 1
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one sample; write a shard when enough are there.

        Args:
            row: values of the shard schema's columns, lists as numpy arrays; null where there is none.
        """
        self._rows.append(row)
        if len(self._rows) >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, if any, as one shard."""
        if self._rows:
            columns = [_column(field, [row.get(field.name) for row in self._rows]) for field in self.schema]
            self.write(pa.Table.from_arrays(columns, schema=self.schema))
            self._rows = []

    def write(self, table: pa.Table) -> Path:
        """Write a table as one shard.

        Args:
            table: rows of the shard schema, with or without its metadata.

        Returns:
            The shard's file.
        """
        sink = pa.BufferOutputStream()
        lists = [
            field.name
            for field in table.schema
            if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
        ]
        pq.write_table(
            table.replace_schema_metadata(self.schema.metadata), sink, compression="zstd",
            use_dictionary=["source", "status"],  # pyright: ignore[reportArgumentType]
            use_byte_stream_split=[f"{name}.list.element" for name in lists],  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        content = sink.getvalue().to_pybytes()
        path = self.store / SHARDS / f"{self.rank:05d}-{self._sequence:06d}-{checksum(content)}.parquet"
        write_atomically(path, content)
        self._sequence += 1
        return path


def checksum(content: bytes) -> str:
    """First 16 hex digits of the SHA-256 of a shard's bytes, as in its name."""
    return hashlib.sha256(content).hexdigest()[:16]


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    """Values of one column; undefined entries of a list become nulls, for a NaN would pass for a number.

    A missing list becomes a list of nulls: before release 26 pyarrow could not read null fixed-size lists from Parquet.
    """
    if not pa.types.is_fixed_size_list(field.type):
        return pa.array(values, field.type)
    width, element = field.type.list_size, field.type.value_type
    kind = element.to_pandas_dtype()
    matrix = np.full((len(values), width), np.nan, dtype=np.result_type(kind, np.float16))
    for i, value in enumerate(values):
        if value is not None:
            matrix[i] = value
    missing = np.isnan(matrix).reshape(-1)
    flat = pa.array(np.where(missing, 0, matrix.reshape(-1)).astype(kind), element, mask=missing)
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type)
