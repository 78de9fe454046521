"""The feature store on disk.

    features/
      manifest.json          what the numbers are: format version, identity, fingerprints, layer table, cost ledger
      manifest.backup.json   the same again, for the day on which the first is damaged
      config.yaml            the command that made it, replayable with `selector run`
      shards/RANK-SEQUENCE-CHECKSUM.parquet
      quarantine/            what `selector verify --repair` took away; never read

A shard is written under a temporary name, flushed to disk and renamed, so that it exists whole or not at all. Its name
carries the first 16 hex digits of the SHA-256 of its bytes: a torn, truncated or flipped file is recognized without any
other record, and ranks never need to agree on one. Its Parquet metadata carries the format version and the store's
fingerprint, so that a foreign shard is recognized too.

Columns of a shard, one row per sample:

    sample_id       string   the user's id, or content hash and occurrence number
    row             int64    position in the data set
    source          string   data set or mixture component, null where none is known
    n_tokens        int32    tokens of the sample
    n_loss_tokens   int32    tokens that carry loss
    truncated       bool     whether tokens were cut off
    status          string   see `STATUSES`
    loss            float32  mean cross-entropy over the loss tokens, nats per token; null without a score
    <measure>       fixed-size list of float32 over the layer table, one column for each of `types.MEASURES`;
                    null entries where a layer got no gradient, and all of them where the sample has no score; none of these columns
                    in stores without spectra, whose layer table is empty
    <score>         float32, one column for each of the identity's `scores`, in alphabetical order; null where the
                    sample has no such score
    sketch          fixed-size list of float16, `sketch_dimension` numbers per entry of the layer table, each entry
                    divided by its `sketch_scale`; only in stores with sketches
    sketch_scale    fixed-size list of float32 over the layer table: gradients of mean losses underflow float16

The identity's `scores` says of each which of its ends comes first, and its unit, so that a store can be read where the scorer
is not registered. Stores of spectra alone lack the entry.

`manifest.json` is rewritten through a rename. `expected` (samples of the data set) is known from the start;
`shards` and `cost` are filled in when a run ends. `data` records how the data set grew: the number of its rows and the
hash of them all, when the store was begun and after each time that rows were appended. The store's fingerprint holds the
first of these alone, so that appending rows keeps the shards that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from selector.errors import StoreError
from selector.types import MEASURES, LayerSpec

FORMAT = "selector-feature-store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BACKUP = "manifest.backup.json"
CONFIG = "config.yaml"
SHARDS = "shards"
QUARANTINE = "quarantine"
METADATA_KEY = b"selector"

STATUSES = ("ok", "zero_gradient", "no_loss_tokens", "nonfinite", "too_long")
"""What can become of a sample; only `ok` has a loss and features. Any other failure reads `error: ...`."""


def shard_schema(n_features: int, sketch_dimension: int = 0, scores: Iterable[str] = ()) -> pa.Schema:
    """Arrow schema of a shard.

    Args:
        n_features: length of the layer table; 0 for a store without spectra.
        sketch_dimension: numbers per entry of the layer table; 0 for a store without sketches.
        scores: names of those that forward passes gave.
    """
    spectra = MEASURES if n_features else ()
    sketches = [
        pa.field("sketch", pa.list_(pa.float16(), n_features * sketch_dimension)),
        pa.field("sketch_scale", pa.list_(pa.float32(), n_features)),
    ]
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("source", pa.string()),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("n_loss_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("loss", pa.float32()),
            *(pa.field(name, pa.list_(pa.float32(), n_features)) for name in spectra),
            *(pa.field(name, pa.float32()) for name in sorted(scores)),
            *(sketches if sketch_dimension else []),
        ]
    )


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a plain value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the numbers of a store are, and what they cost."""

    identity: dict[str, Any]
    """Everything that changes the numbers: settings, and fingerprints of model, tokenizer and data."""
    layers: tuple[LayerSpec, ...]
    """The layer table: what each entry of a feature list belongs to."""
    expected: int
    """Samples that the finished store holds."""
    data: tuple[dict[str, Any], ...] = ()
    """How the data set grew: `rows` and `fingerprint` of all rows, when the store was begun and after each append."""
    command: dict[str, Any] = field(default_factory=dict)
    """The command and settings of the last run, as in `config.yaml`."""
    execution: dict[str, Any] = field(default_factory=dict)
    """Settings of the last run that change no number."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions of the last run."""
    shards: tuple[str, ...] = ()
    """File names of all shards when the last run ended; empty before that."""
    cost: tuple[dict[str, Any], ...] = ()
    """One ledger entry per run: seconds, samples, tokens, device."""

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the identity and the layer table, which every shard carries."""
        return fingerprint({"identity": self.identity, "layers": [dataclasses.asdict(spec) for spec in self.layers]})

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the store's shards."""
        return shard_schema(len(self.layers), self.identity.get("sketch_dimension", 0), self.scores)

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Scores that forward passes gave, by name: `higher_first` and `unit`."""
        return self.identity.get("scores", {})

    @property
    def shard_metadata(self) -> dict[bytes, bytes]:
        """What a shard's Parquet metadata says of its owner."""
        return {METADATA_KEY: json.dumps({"store": self.fingerprint, "format_version": FORMAT_VERSION}).encode()}

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        values = dataclasses.asdict(self)
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "checksum": fingerprint(values),
            "fingerprint": self.fingerprint,
        }
        return json.dumps(head | values, indent=1, ensure_ascii=False)

    @classmethod
    def load(cls, store: Path, name: str = MANIFEST) -> Manifest:
        """Read the manifest of a store.

        Args:
            store: the store's directory.
            name: which of the two copies.

        Raises:
            StoreError: there is none, it is damaged, or it has another format or version.
        """
        path = store / name
        repair = f"run `selector verify {store} --repair`"
        if not path.is_file():
            lost = (store / SHARDS).is_dir()
            raise StoreError(
                f"no feature store at {store}",
                got="no " + name,
                fix=repair if lost else "make one with `selector score`",
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = (values.pop("format"), values.pop("format_version"))
            recorded = (values.pop("checksum"), values.pop("fingerprint"))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is damaged", got=repr(error), fix=repair) from error
        if found != (FORMAT, FORMAT_VERSION):
            raise StoreError(
                f"{path} has another format", got=" version ".join(map(str, found)),
                allowed=f"{FORMAT} version {FORMAT_VERSION}", fix="score again with this release",
            )  # fmt: skip
        try:
            values["layers"] = tuple(LayerSpec(**spec) for spec in values["layers"])
            values |= {name: tuple(values[name]) for name in ("data", "shards", "cost")}
            manifest = cls(**values)
        except (TypeError, KeyError) as error:
            raise StoreError(f"{path} is damaged", got=repr(error), fix=repair) from error
        computed = (fingerprint(dataclasses.asdict(manifest)), manifest.fingerprint)
        if computed != recorded:
            raise StoreError(f"{path} was altered", got="checksum " + computed[0], allowed=recorded[0], fix=repair)
        return manifest


def identity_conflicts(store: Path, old: Manifest, new: Manifest) -> list[StoreError]:
    """Every identity field in which a new run differs from the store that it would continue.

    Args:
        store: the store's directory, for messages.
        old: what the store holds.
        new: what the run would write.
    """
    fields = [
        StoreError(f"{store} belongs to another run: {name} differs", got=_shown(new.identity.get(name)), allowed=_shown(old.identity.get(name)),
                   fix="use the same setting, or another output directory")
        for name in sorted({*old.identity, *new.identity})
        if old.identity.get(name) != new.identity.get(name)
    ]  # fmt: skip
    if not fields and old.layers != new.layers:
        fields = [
            StoreError(
                f"{store} has another layer table",
                got=len(new.layers),
                allowed=len(old.layers),
                fix="use another output directory",
            )
        ]
    return fields


def _shown(value: Any) -> Any:
    """A field of an identity in a message: of a mapping its names."""
    if isinstance(value, dict):
        value = ", ".join(value) or None
    return "none" if value is None else value
