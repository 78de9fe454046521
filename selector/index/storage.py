"""An index on disk.

    index/
      manifest.json         plan, standardization, fingerprint of the feature store, and name, size and SHA-256 of each file
      members-*.parquet     sample ids and metadata, in the order of positions
      space-*.npz           axes of the rotation and their energy; center and scale of the standardization
      vectors-*.npy         whole rotated vectors, float32, opened as a memory map
      leading-*.npy         their leading dimensions alone, where those serve as a shortlist
      lists-*.faiss         inverted lists in FAISS's format, opened as a memory map

Files are named by the first 16 hex digits of their SHA-256, and the manifest that names them is replaced by a rename: an
index is the old or the new one, whatever happens in between. When an index is opened every checksum is compared, except
for the two plain arrays, whose size is; `verify` compares those too. Nothing is unpickled, and FAISS never sees a file
whose checksum did not match.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selector.errors import GradientIndexError, raise_all
from selector.store.writer import write_atomically

FORMAT = "selector-index"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SUFFIXES = {"members": ".parquet", "space": ".npz", "vectors": ".npy", "leading": ".npy", "lists": ".faiss"}
ARRAYS = ("vectors", "leading")

REBUILD = "build it again with `selector index`"


def write(path: Path, writers: Mapping[str, Callable[[Path], object]], manifest: Mapping[str, Any]) -> None:
    """Write all files of an index, then the manifest that makes them count; remove what it no longer names.

    Args:
        path: the directory, made when missing.
        writers: for each role of `SUFFIXES` that is there, what writes its file.
        manifest: the rest of the manifest, as plain values.

    Raises:
        GradientIndexError: the directory holds something else.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).exists())):
        raise GradientIndexError(
            f"{path} is in use by something else", got="files that are no index", fix="choose an empty or new directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    files = {role: _write_file(path, role, writer) for role, writer in writers.items()}
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    write_atomically(path / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False).encode())
    current = {entry["name"] for entry in files.values()}
    for role, suffix in SUFFIXES.items():
        for old in path.glob(f"{role}-*{suffix}"):
            if old.name not in current:
                old.unlink()


def _write_file(path: Path, role: str, writer: Callable[[Path], object]) -> dict[str, Any]:
    temporary = path / f".{role}.tmp-{os.getpid()}{SUFFIXES[role]}"
    try:
        writer(temporary)
        digest = _digest(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        name = f"{role}-{digest[:16]}{SUFFIXES[role]}"
        os.replace(temporary, path / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "bytes": (path / name).stat().st_size, "sha256": digest}


def read(path: Path, *, whole: bool = False) -> tuple[dict[str, Any], dict[str, Path]]:
    """Read a manifest and make sure that its files are the ones it names.

    Args:
        path: the index's directory.
        whole: compare the checksums of the large arrays too.

    Returns:
        The manifest's values, and the path of each role's file.

    Raises:
        GradientIndexError: there is no index, it has another format, or files are missing or damaged; all of them at once.
    """
    if not (path / MANIFEST).is_file():
        raise GradientIndexError(f"no index at {path}", got="no " + MANIFEST, fix="make one with `selector index`")
    try:
        values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = (values["format"], values["format_version"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise GradientIndexError(f"{path / MANIFEST} is damaged", got=repr(error), fix=REBUILD) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise GradientIndexError(f"{path} has another format", got=found, allowed=(FORMAT, FORMAT_VERSION), fix=REBUILD)
    try:
        entries = {role: (path / Path(entry["name"]).name, entry) for role, entry in values["files"].items()}
        problems = [_problem(file, entry, whole or role not in ARRAYS) for role, (file, entry) in entries.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise GradientIndexError(f"{path / MANIFEST} is damaged", got=repr(error), fix=REBUILD) from error
    raise_all([problem for problem in problems if problem is not None])
    return values, {role: file for role, (file, _) in entries.items()}


def _problem(file: Path, entry: Mapping[str, Any], checksum: bool) -> GradientIndexError | None:
    if not file.is_file():
        return GradientIndexError(f"{file.name} is missing", fix=REBUILD)
    if (size := file.stat().st_size) != entry["bytes"]:
        return GradientIndexError(f"{file.name} is damaged", got=f"{size} bytes", allowed=entry["bytes"], fix=REBUILD)
    if checksum and (digest := _digest(file)) != entry["sha256"]:
        return GradientIndexError(
            f"{file.name} is damaged", got=f"checksum {digest[:16]}", allowed=entry["sha256"][:16], fix=REBUILD
        )
    return None


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
