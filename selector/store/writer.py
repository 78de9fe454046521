"""Write a feature store, one shard at a time; nothing that can be seen is ever half written.

Each rank owns a writer and names its shards by its rank, so no two ranks touch one file. Temporary files of a killed run
are removed when the next one starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selector.errors import StoreError, raise_all
from selector.store.schema import MANIFEST, METADATA_KEY, SHARDS, Manifest, identity_conflicts, shard_schema
from selector.types import MEASURES


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


def create_or_check(store: Path, manifest: Manifest) -> Manifest:
    """Begin a store, or make sure that an existing one belongs to the same run.

    Args:
        store: the store's directory; made when missing.
        manifest: what the run would write.

    Returns:
        The manifest in force: the new one, with the cost ledger of the old one.

    Raises:
        StoreError: the directory holds something else, or a store with another identity; all differences at once.
    """
    if (store / MANIFEST).exists():
        old = Manifest.load(store)
        raise_all(identity_conflicts(store, old, manifest))
        manifest = dataclasses.replace(manifest, cost=old.cost, shards=old.shards, expected=max(old.expected, manifest.expected))
    elif store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise StoreError(f"{store} is in use by something else", got="files that are no feature store", fix="choose an empty or new directory")
    (store / SHARDS).mkdir(parents=True, exist_ok=True)
    for leftover in store.rglob(".*.tmp-*"):
        leftover.unlink(missing_ok=True)
    write_atomically(store / MANIFEST, manifest.to_json().encode())
    return manifest


class StoreWriter:
    """Collects the rows of one rank and writes them as shards.

    Args:
        store: the store's directory, begun by `create_or_check`.
        manifest: the manifest in force.
        rank: the process's rank, part of its shards' names.
        shard_rows: rows per shard.
    """

    def __init__(self, store: Path, manifest: Manifest, *, rank: int = 0, shard_rows: int = 512) -> None:
        self.store, self.rank, self.shard_rows = store, rank, shard_rows
        self.schema = shard_schema(len(manifest.layers)).with_metadata(
            {METADATA_KEY: json.dumps({"store": manifest.fingerprint}).encode()}
        )
        taken = [int(p.name.split("-")[1]) for p in (store / SHARDS).glob(f"{rank:05d}-*.parquet")]
        self._sequence = max(taken, default=-1) + 1
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one sample; write a shard when enough are there.

        Args:
            row: a value for each column of the shard schema; measures as float32 [F] or None.
        """
        self._rows.append(row)
        if len(self._rows) >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, if any, as one shard."""
        if not self._rows:
            return
        table = pa.Table.from_pylist([_without_nan(row) for row in self._rows], schema=self.schema)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=["source", "status"])
        content = sink.getvalue().to_pybytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self.store / SHARDS / f"{self.rank:05d}-{self._sequence:06d}-{digest}.parquet", content)
        self._sequence += 1
        self._rows = []


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Features as lists whose undefined entries are nulls: a NaN would pass for a number."""
    lists = {name: row[name] for name in MEASURES if row[name] is not None}
    return {**row, **{name: [None if x != x else x for x in values.tolist()] for name, values in lists.items()}}
