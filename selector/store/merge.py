"""Join the stores that the nodes of one run wrote where they share no file system.

Shards are copied as they are; only one that holds samples which are there already is written again without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selector.errors import SelectorError, StoreError, raise_all
from selector.store.lineage import is_extension
from selector.store.reader import FeatureStore
from selector.store.schema import MANIFEST, SHARDS, Manifest, identity_conflicts
from selector.store.writer import StoreWriter, checksum, create, write_atomically, write_manifest


def merge(stores: Sequence[str | Path], out: str | Path) -> FeatureStore:
    """Join stores of equal identity; a sample that several hold is kept once.

    Args:
        stores: directories of the stores.
        out: directory of the joined store: new, empty, or a store of the same identity, which then grows.

    Returns:
        The joined store, which may still be unfinished.

    Raises:
        StoreError: stores differ in what they measured, or a shard is damaged; all differences at once.
    """
    target = Path(out)
    sources = [Path(store) for store in stores if Path(store).resolve() != target.resolve()]
    if (target / MANIFEST).exists():
        sources.insert(0, target)
    elif target.exists() and any(target.iterdir()):
        raise StoreError(
            f"{target} is in use by something else",
            got="files that are no feature store",
            fix="choose an empty or new directory",
        )
    manifests = [Manifest.load(source) for source in sources]
    raise_all(_conflicts(sources, manifests))
    longest = max(manifests, key=lambda manifest: len(manifest.data))
    cost = {str(entry): entry for manifest in manifests for entry in manifest.cost}
    joined = replace(longest, expected=max(m.expected for m in manifests), cost=tuple(cost.values()), shards=())
    create(target, joined)
    writer = StoreWriter(target, joined)
    seen: set[str] = set()
    for source, manifest in zip(sources, manifests, strict=True):
        for path, table in _sound_shards(FeatureStore(source, manifest)):
            new = [sample_id not in seen for sample_id in table["sample_id"].to_pylist()]
            seen.update(table["sample_id"].to_pylist())
            if source == target:
                continue
            if all(new):
                write_atomically(target / SHARDS / path.name, path.read_bytes())
            elif any(new):
                writer.write(table.filter(pa.array(new)))
    store = FeatureStore(target, joined)
    write_manifest(target, replace(joined, shards=tuple(path.name for path in store.shard_paths())))
    return FeatureStore.open(target)


def _conflicts(sources: Sequence[Path], manifests: Sequence[Manifest]) -> list[SelectorError]:
    problems: list[SelectorError] = []
    first = manifests[0]
    for source, manifest in zip(sources[1:], manifests[1:], strict=True):
        problems += identity_conflicts(source, first, manifest)
        longer, shorter = sorted((first.data, manifest.data), key=len, reverse=True)
        if not is_extension(longer, shorter):
            problems.append(
                StoreError(
                    f"{source} and {sources[0]} have grown apart",
                    got=manifest.data[-1],
                    allowed=first.data[-1],
                    fix="append the same rows to both",
                )
            )
    return problems


def _sound_shards(store: FeatureStore):
    """Files and tables of a store whose bytes are as they were written."""
    for path in store.shard_paths():
        if path.stem.rpartition("-")[2] != checksum(path.read_bytes()):
            raise StoreError(
                f"shard {path.name} of {store.path} is damaged",
                fix=f"run `selector verify {store.path} --repair` first",
            )
        yield path, pq.read_table(path)
