"""Find what is wrong with a feature store, and put right what can be put right without the model.

Nothing is believed that can be computed again: a shard's name must carry the checksum of its bytes, its metadata must name
this store and this format, its columns must be those of the layer table, and no sample may be there twice. Of the two
copies of the manifest the one that the shards name as their owner is right. Repair never deletes: what is taken away
lies in `quarantine/` afterwards, and the samples that it held are scored again by the command that began the store.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from selector.errors import StoreError
from selector.store.schema import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_BACKUP,
    METADATA_KEY,
    QUARANTINE,
    SHARDS,
    Manifest,
)
from selector.store.writer import StoreWriter, checksum, is_beginning, temporary_files, write_manifest, write_settings

PARQUET_END = b"PAR1"
EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong."""

    kind: str
    """Its name in two or three words, such as `truncated shard`."""
    path: Path
    """The file that it is about."""
    error: StoreError
    """The message for the user."""


def shard_files(store: Path) -> list[Path]:
    """Files of a store's shards, in a fixed order.

    Args:
        store: the store's directory.
    """
    return sorted(path for path in (store / SHARDS).glob("*.parquet") if not path.name.startswith("."))


def shard_owner(schema: pa.Schema) -> dict[str, Any]:
    """What a shard says of the store that it belongs to; empty where it says nothing.

    Args:
        schema: the shard's schema with its metadata.
    """
    try:
        owner = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def inspect(store: Path) -> tuple[Manifest | None, list[Damage]]:
    """Check every file of a store, and the samples against each other.

    Args:
        store: the store's directory.

    Returns:
        The manifest that is right, None when neither copy is, and everything that is wrong.
    """
    manifest, damages = _inspect_manifests(store)
    for leftover in temporary_files(store):
        damages.append(_damage("temporary file", leftover, "is left of a killed run"))
    if manifest is None:
        return None, damages
    damages += _inspect_settings(store)
    sound: set[str] = set()
    seen: set[str] = set()
    for path in sorted((store / SHARDS).glob("[!.]*")):
        found, ids = _inspect_shard(path, manifest)
        doubled = len(ids) - len(set(ids) - seen)
        if doubled:
            example = next(sample_id for i, sample_id in enumerate(ids) if sample_id in seen or sample_id in ids[:i])
            found.append(
                _damage(
                    "doubled samples",
                    path,
                    f"holds {doubled} samples that are there already",
                    got=example,
                    allowed="each sample once",
                )
            )
        seen |= set(ids)
        damages += found
        if not found or doubled:
            sound.add(_digest_in_name(path))
    named = {damage.path.name for damage in damages}
    for name in manifest.shards:
        if name not in named and _digest_in_name(Path(name)) not in sound:
            damages.append(_damage("missing shard", store / SHARDS / name, "is missing"))
    if not damages and len(seen) < manifest.expected:
        damages.append(
            _damage(
                "unfinished store",
                store,
                "is unfinished",
                got=f"{len(seen):,} samples",
                allowed=f"{manifest.expected:,}",
            )
        )
    return manifest, damages


def repair(store: Path, damages: Sequence[Damage], manifest: Manifest | None) -> None:
    """Put right what `inspect` found, as far as that needs no model; what is missing then is to be scored again.

    Args:
        store: the store's directory.
        damages: what is wrong.
        manifest: the manifest that is right, None when neither copy is.
    """
    for damage in damages:
        if damage.kind == "renamed shard" and manifest is not None:
            _restore_name(damage.path, manifest)
        elif damage.kind == "doubled samples" and manifest is not None:
            _remove_doubled(store, damage.path, manifest)
        elif damage.kind == "damaged settings" and manifest is not None:
            write_settings(store, manifest)
        elif damage.path.is_file():
            _quarantine(store, damage.path)
    if manifest is not None:
        write_manifest(store, replace(manifest, shards=tuple(path.name for path in shard_files(store))))


def _damage(kind: str, path: Path, problem: str, **parts: Any) -> Damage:
    store = path if kind == "unfinished store" else path.parent.parent if path.parent.name == SHARDS else path.parent
    fix = (
        "run the same `selector score` command again"
        if kind == "unfinished store"
        else f"run `selector verify {store} --repair`"
    )
    return Damage(kind, path, StoreError(f"{kind}: {path.name} {problem}", **parts, fix=fix))


def _inspect_manifests(store: Path) -> tuple[Manifest | None, list[Damage]]:
    """The copy of the manifest that is right, and what is wrong with each."""
    if store.is_dir() and is_beginning(store) and not shard_files(store):
        return None, [
            _damage("unfinished store", store, "has no manifest yet", got="a run that was killed at its start")
        ]
    damages: list[Damage] = []
    sound: dict[str, Manifest] = {}
    for name in (MANIFEST, MANIFEST_BACKUP):
        if name == MANIFEST_BACKUP and not (store / name).exists() and MANIFEST in sound and not sound[MANIFEST].shards:
            continue  # the very first run was killed between the two
        try:
            sound[name] = Manifest.load(store, name)
        except StoreError as error:
            damages.append(
                _damage(
                    "damaged manifest",
                    store / name,
                    "cannot be used",
                    got=error.got or error.problem,
                    allowed=error.allowed,
                )
            )
    if len({manifest.fingerprint for manifest in sound.values()}) > 1:
        owners = Counter(owner for path in shard_files(store) if (owner := _owner_of_file(path)) is not None)
        right = max(sound, key=lambda name: (owners[sound[name].fingerprint], name == MANIFEST))
        wrong = next(name for name in sound if name != right)
        damages.append(
            _damage(
                "foreign manifest",
                store / wrong,
                "belongs to another store",
                got=sound.pop(wrong).fingerprint,
                allowed=sound[right].fingerprint,
            )
        )
    return next(iter(sound.values()), None), damages


def _inspect_settings(store: Path) -> list[Damage]:
    try:
        settings = yaml.safe_load((store / CONFIG).read_text(encoding="utf-8"))
        sound = isinstance(settings, dict) and "command" in settings
        got: object = None if sound else "no command"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        sound, got = False, str(error).splitlines()[0]
    return [] if sound else [_damage("damaged settings", store / CONFIG, "cannot be replayed", got=got)]


def _inspect_shard(path: Path, manifest: Manifest) -> tuple[list[Damage], list[str]]:
    """What is wrong with one shard, and the ids that it holds when nothing is."""

    def wrong(kind: str, problem: str, **parts: Any) -> tuple[list[Damage], list[str]]:
        return [_damage(kind, path, problem, **parts)], []

    content = path.read_bytes() if path.is_file() else b""
    digest, named = checksum(content), _digest_in_name(path)
    if path.suffix != ".parquet":
        return wrong("stray file", "is no shard", allowed="Parquet files that the scorer wrote")
    if not content:
        return wrong("empty shard", "holds nothing", got="0 bytes")
    if digest != named:
        if any(_digest_in_name(Path(name)) == digest for name in manifest.shards):
            return wrong("renamed shard", "has another name than it was given", got=f"checksum {digest}", allowed=named)
        if not content.endswith(PARQUET_END):
            return wrong(
                "truncated shard",
                "lacks its end",
                got=f"{len(content):,} bytes, checksum {digest}",
                allowed=f"checksum {named}",
            )
        return wrong("altered shard", "has other bytes than were written", got=f"checksum {digest}", allowed=named)
    try:
        table = pq.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        return wrong("unreadable shard", "is no Parquet file", got=error)
    owner = shard_owner(table.schema)
    if owner.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return wrong(
            "shard of another version",
            "has another format",
            got=f"version {owner['format_version']}",
            allowed=f"version {FORMAT_VERSION}",
        )
    if owner.get("store") != manifest.fingerprint:
        return wrong("foreign shard", "belongs to another store", got=owner.get("store"), allowed=manifest.fingerprint)
    if not manifest.fits(table.schema.remove_metadata()):
        return wrong(
            "shard with other columns",
            "does not fit the layer table",
            got=table.schema.names,
            allowed=manifest.schema.names,
        )
    return [], table["sample_id"].to_pylist()


def _digest_in_name(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def _owner_of_file(path: Path) -> str | None:
    try:
        return shard_owner(pq.read_schema(path)).get("store")
    except (pa.ArrowInvalid, OSError):
        return None


def _restore_name(path: Path, manifest: Manifest) -> None:
    """Give a shard the name under which the manifest knows its bytes."""
    digest = checksum(path.read_bytes())
    name = next(name for name in manifest.shards if _digest_in_name(Path(name)) == digest)
    os.replace(path, path.with_name(name))


def _remove_doubled(store: Path, path: Path, manifest: Manifest) -> None:
    """Write a shard again without the samples that shards before it hold, and without its own repetitions."""
    before = [pq.read_table(p, columns=["sample_id"]) for p in shard_files(store) if p < path]
    seen = {sample_id for table in before for sample_id in table["sample_id"].to_pylist()}
    table = pq.read_table(path)
    new = []
    for sample_id in table["sample_id"].to_pylist():
        new.append(sample_id not in seen)
        seen.add(sample_id)
    if any(new):
        StoreWriter(store, manifest).write(table.filter(pa.array(new)))
    _quarantine(store, path)


def _quarantine(store: Path, path: Path) -> None:
    (store / QUARANTINE).mkdir(exist_ok=True)
    os.replace(path, store / QUARANTINE / path.name)
