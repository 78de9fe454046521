"""Every kind of damage to a feature store is found, named and repaired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selector.assets import POOL
from selector.cli.inspect import VerifyCommand
from selector.cli.score import ScoreCommand
from selector.config import ScoreConfig
from selector.errors import StoreError
from selector.store import FeatureStore
from selector.store.schema import MANIFEST, MANIFEST_BACKUP, Manifest
from selector.store.verify import inspect, repair
from selector.store.writer import StoreWriter, checksum
from selector.types import MEASURES

SAMPLES, SHARD_ROWS = 12, 3


def score(model: Path, out: Path, **changes) -> None:
    config = ScoreConfig(**({"limit": SAMPLES, "shard_rows": SHARD_ROWS, "tokens_per_batch": 700} | changes))
    assert ScoreCommand(model=str(model), data=str(POOL), out=out, config=config).run() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    """A tiny model on disk, so that a store's own command can run again."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sound(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "store"
    score(model, path)
    return path


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory) -> Path:
    """Same samples and model, other layers."""
    path = tmp_path_factory.mktemp("foreign") / "store"
    score(model, path, layers=(1,))
    return path


@pytest.fixture
def store(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def shard(store: Path, i: int = 1) -> Path:
    return sorted((store / "shards").glob("*.parquet"))[i]


def rename_to_content(path: Path) -> None:
    """Give a file the name that its bytes deserve, so that only its contents betray it."""
    path.rename(path.with_name(f"00007-000000-{checksum(path.read_bytes())}.parquet"))


def torn(store, foreign):
    content = shard(store).read_bytes()
    shard(store).write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def truncated(store, foreign):
    shard(store).write_bytes(shard(store).read_bytes()[:-9])


def empty(store, foreign):
    shard(store).write_bytes(b"")


def bit_flipped(store, foreign):
    content = bytearray(shard(store).read_bytes())
    content[len(content) // 3] ^= 4
    shard(store).write_bytes(content)


def missing(store, foreign):
    shard(store).unlink()


def renamed(store, foreign):
    shard(store).rename(store / "shards" / "copy of shard 1.parquet")


def foreign_shard(store, foreign):
    shutil.copy(shard(foreign, 0), store / "shards")


def other_version(store, foreign):
    table = pq.read_table(shard(store))
    metadata = {b"selector": json.dumps({"store": Manifest.load(store).fingerprint, "format_version": 99}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), shard(store))
    rename_to_content(shard(store))


def other_columns(store, foreign):
    table = pq.read_table(shard(store))
    pq.write_table(table.drop_columns(["loss"]), shard(store))
    rename_to_content(shard(store))


def doubled(store, foreign):
    table = pq.read_table(shard(store, 0)).slice(1)
    StoreWriter(store, Manifest.load(store), rank=3).write(table)


def copied(store, foreign):
    shutil.copy(shard(store), shard(store).with_name(shard(store).name.replace("00000-", "00009-", 1)))


def no_parquet(store, foreign):
    shard(store).write_bytes(b"not a table PAR1")
    rename_to_content(shard(store))


def stray_temporary(store, foreign):
    (store / "shards" / ".00000-000009-0.parquet.tmp-77").write_bytes(b"half")


def stray_file(store, foreign):
    (store / "shards" / "notes.txt").write_text("remember the milk")


def bad_manifest(store, foreign):
    text = (store / MANIFEST).read_text()
    (store / MANIFEST).write_text(text[: len(text) // 2])


def altered_manifest(store, foreign):
    (store / MANIFEST).write_text((store / MANIFEST).read_text().replace('"expected": 12', '"expected": 11'))


def lost_manifest(store, foreign):
    (store / MANIFEST).unlink()


def foreign_manifest(store, foreign):
    shutil.copy(foreign / MANIFEST, store / MANIFEST)


def both_manifests(store, foreign):
    (store / MANIFEST).write_text("{}")
    (store / MANIFEST_BACKUP).unlink()


def settings(store, foreign):
    (store / "config.yaml").write_text("{")


NAMED = {
    torn: "truncated shard", truncated: "truncated shard", empty: "empty shard", bit_flipped: "altered shard",
    missing: "missing shard", renamed: "renamed shard", foreign_shard: "foreign shard", other_version: "shard of another version",
    other_columns: "shard with other columns", doubled: "doubled samples", copied: "doubled samples", no_parquet: "unreadable shard",
    stray_temporary: "temporary file", stray_file: "stray file", bad_manifest: "damaged manifest", altered_manifest: "damaged manifest",
    lost_manifest: "damaged manifest", foreign_manifest: "foreign manifest", both_manifests: "damaged manifest", settings: "damaged settings",
}  # fmt: skip


@pytest.mark.parametrize("corrupt", NAMED, ids=lambda corrupt: corrupt.__name__)
def test_damage_is_found_named_and_repaired(store, sound, foreign, corrupt, capsys):
    corrupt(store, foreign)
    assert VerifyCommand(store=store).run() == 1
    assert f"error: {NAMED[corrupt]}: " in capsys.readouterr().err
    assert VerifyCommand(store=store, repair=True).run() == 0
    assert "all sound" in capsys.readouterr().out
    assert inspect(store)[1] == []
    before, after = FeatureStore.open(sound), FeatureStore.open(store)
    assert after.ids.tolist() == before.ids.tolist()
    for measure in MEASURES:
        np.testing.assert_allclose(after.features(measure), before.features(measure), rtol=1e-5)


def test_several_damages_at_once_are_all_named_and_repaired(store, foreign, capsys):
    truncated(store, foreign)
    doubled(store, foreign)
    foreign_manifest(store, foreign)
    assert VerifyCommand(store=store).run() == 1
    messages = capsys.readouterr().err
    for name in ("truncated shard", "doubled samples", "foreign manifest"):
        assert name in messages
    assert VerifyCommand(store=store, repair=True).run() == 0


def test_repair_deletes_nothing(store, foreign):
    content = shard(store).read_bytes()[:-5]
    shard(store).write_bytes(content)
    name = shard(store).name
    manifest, damages = inspect(store)
    repair(store, damages, manifest)
    assert (store / "quarantine" / name).read_bytes() == content


def test_sound_store_is_left_as_it_is(store):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert VerifyCommand(store=store).run() == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_directory_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no feature store"):
        VerifyCommand(store=tmp_path).run()
    with pytest.raises(StoreError, match="no feature store"):
        VerifyCommand(store=tmp_path, repair=True).run()


def test_reading_a_damaged_shard_says_how_to_repair_it(store, foreign):
    truncated(store, foreign)
    with pytest.raises(StoreError, match="--repair"):
        FeatureStore.open(store).to_arrow()


@pytest.mark.parametrize(
    "left", [(), ("shards",), ("shards", "config.yaml"), ("shards", ".manifest.json.tmp-7")], ids=" ".join
)
def test_run_killed_before_its_first_manifest_can_be_repeated(model, tmp_path, left):
    out = tmp_path / "store"
    out.mkdir()
    for name in left:
        (out / name).mkdir() if name == "shards" else (out / name).write_text("half")
    kinds = {damage.kind for damage in inspect(out)[1]}
    assert kinds == {"unfinished store"} | ({"temporary file"} if len(left) > 1 and left[1].startswith(".") else set())
    score(model, out, limit=2)
    assert VerifyCommand(store=out).run() == 0
