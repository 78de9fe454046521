"""The command line from end to end: what a person types, reads, and gets wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from selector.assets import POOL, TINY_MODEL
from selector.cli import main
from selector.selection import Selection
from selector.store import FeatureStore

SMALL = ["--layers", "0", "-1", "--projections", "q", "o", "--precision", "high"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A store of 24 embedded rows, made by the command itself."""
    out = tmp_path_factory.mktemp("cli") / "features"
    assert (
        main(
            [
                "score",
                "--model",
                str(TINY_MODEL),
                "--data",
                str(POOL),
                "--out",
                str(out),
                "--id-column",
                "id",
                "--limit",
                "24",
                *SMALL,
            ]
        )
        == 0
    )
    return out


def message(capsys, arguments, code=2) -> str:
    """What a failing command prints for the person."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_score_verify_info_index_search_select(scored, tmp_path, capsys, monkeypatch):
    assert main(["verify", str(scored)]) == 0
    assert main(["info", str(scored)]) == 0
    assert "24 of 24 samples" in capsys.readouterr().out
    assert main(["index", str(scored), "--out", str(tmp_path / "index")]) == 0
    some_id = FeatureStore.open(scored).ids[0]
    assert main(["search", str(tmp_path / "index"), "--ids", some_id, "--k", "3", "--data", str(POOL)]) == 0
    assert f"near {some_id}" in capsys.readouterr().out
    row = next(json.loads(line) for line in POOL.read_text().splitlines())
    like = [
        "search",
        str(tmp_path / "index"),
        "--like",
        json.dumps({"prompt": row["prompt"], "completion": row["completion"]}),
    ]
    assert main([*like, "--store", str(scored), "--k", "1"]) == 0
    assert row["id"] in capsys.readouterr().out  # a row of the pool is its own nearest neighbor
    assert "needs the store" in message(capsys, like)
    with monkeypatch.context() as patch:  # the tokenizer is another one than when the store was made
        patch.setattr("selector.scorer.plan.tokenizer_fingerprint", lambda tokenizer: "another")
        assert "tokenizer differ" in message(capsys, [*like, "--store", str(scored)])
    assert "nothing to search for" in message(capsys, ["search", str(tmp_path / "index")])
    assert main(["select", str(scored), "--budget", "25%", "--out", str(tmp_path / "selection")]) == 0
    printed = capsys.readouterr().out
    assert "raw" in printed
    assert "length-controlled" in printed
    assert "no better model than chance" in " ".join(printed.split())  # what the evidence says of the default
    selection = Selection.load(tmp_path / "selection" / "selection.parquet")
    control = Selection.load(tmp_path / "selection" / "matched_random.parquet")
    assert len(selection) == 6
    assert control.n_tokens.sum() <= selection.n_tokens.sum()


def test_export_matches_rows_by_id_and_refuses_another_file(scored, tmp_path, capsys):
    assert main(["select", str(scored), "--budget", "5", "--out", str(tmp_path / "s")]) == 0
    selection = tmp_path / "s" / "selection.parquet"
    export = ["export", str(selection), "--out", str(tmp_path / "out"), "--id-column", "id"]
    rows = [json.loads(line) for line in POOL.read_text().splitlines()]
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert main([*export, "--data", str(shuffled)]) == 0
    written = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == Selection.load(selection).ids.tolist()
    by_id = {row["id"]: row["completion"] for row in rows}
    assert all(row["completion"] == by_id[row["id"]] for row in written)
    assert main(["run", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "data.jsonl").read_bytes() == (tmp_path / "out" / "data.jsonl").read_bytes()
    assert "no row of the data set is in the selection" in message(capsys, [*export[:-2], "--data", str(POOL)])
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in rows[24:]))
    assert "are not in the data set" in message(capsys, [*export, "--data", str(shuffled)])


def test_every_output_directory_can_be_replayed(scored, tmp_path, capsys):
    first = FeatureStore.open(scored).features("effective_rank")
    assert main(["run", str(scored)]) == 0
    np.testing.assert_array_equal(FeatureStore.open(scored).features("effective_rank"), first)
    assert main(["run", str(scored), "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_allclose(FeatureStore.open(tmp_path / "again").features("effective_rank"), first, rtol=1e-5)
    assert (
        main(
            ["select", str(scored), "--policy", "random", "--budget", "5", "--seed", "3", "--out", str(tmp_path / "s")]
        )
        == 0
    )
    assert main(["run", str(tmp_path / "s"), "--out", str(tmp_path / "t")]) == 0
    ids = [Selection.load(tmp_path / name / "selection.parquet").ids.tolist() for name in "st"]
    assert ids[0] == ids[1]


def test_settings_file_cannot_run_foreign_code_or_write_elsewhere(tmp_path, capsys):
    settings = {"command": "score", "model": "m", "data": "d", "out": "x", "trust_remote_code": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert "asks to run foreign code" in message(capsys, ["run", str(path)])
    del settings["trust_remote_code"]
    for out in ("/etc/selector", "../elsewhere"):
        path.write_text(yaml.safe_dump(settings | {"out": out}))
        assert "must lie below the current directory" in message(capsys, ["run", str(path)])
    path.write_text("!!python/object/apply:os.system ['true']")
    assert "no YAML that can be loaded safely" in message(capsys, ["run", str(path)])
    path.write_text(yaml.safe_dump(settings | {"config": {"precison": "fast", "max_length": "long"}}))
    shown = message(capsys, ["run", str(path)])
    assert "did you mean 'precision'?" in shown
    assert "max_length has the wrong type" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["score", "--model", "/no/model", "--data", "/no/data.jsonl", "--out", "OUT"], ["2 problems", "there is no file", "there is no model"]),
        (["score", "--model", str(TINY_MODEL), "--data", str(POOL), "--out", "OUT", "--columns", "prompt=question"], ["no column 'question'"]),
        (["score", "--model", str(TINY_MODEL), "--data", str(POOL), "--out", "OUT", "--max-length", "20"], ["longer than the maximum", "20 tokens"]),
        (["verify", "OUT"], ["no feature store"]),
        (["select", "OUT", "--out", "OUT2"], ["no feature store"]),
        (["run", "OUT"], ["cannot be read"]),
    ],
)  # fmt: skip
def test_mistakes_are_explained_and_leave_nothing_behind(tmp_path, capsys, arguments, parts):
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in arguments]
    shown = message(capsys, arguments)
    for part in [*parts, "fix:" if "20 tokens" not in parts else "--truncation"]:
        assert part in shown
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_without_tokenizer_is_explained(small_llama, tmp_path, capsys):
    small_llama.save_pretrained(tmp_path / "model")
    shown = message(
        capsys, ["score", "--model", str(tmp_path / "model"), "--data", str(POOL), "--out", str(tmp_path / "out")]
    )
    assert "the tokenizer of" in shown
    assert not (tmp_path / "out").exists()


def test_model_of_nans_ends_with_exit_code_3(small_llama, tokenizer, tmp_path, capsys):
    import torch

    with torch.no_grad():
        small_llama.model.norm.weight.fill_(float("nan"))
    small_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        "score",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(POOL),
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "4",
    ]
    shown = message(capsys, arguments, code=3)
    assert "4 of 4 samples have no score" in shown
    assert "4 nonfinite" in shown
    assert FeatureStore.open(tmp_path / "out").verify() == []
    assert "no sample has a score" in message(capsys, ["select", str(tmp_path / "out"), "--out", str(tmp_path / "s")])


def test_rubbish_in_a_store_is_found(scored, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(scored, copy)
    (shard,) = (copy / "shards").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert "altered shard" in message(capsys, ["verify", str(copy)], code=1)
    (copy / "manifest.json").write_text(json.dumps({"format": "something"}))
    assert "is damaged" in message(capsys, ["info", str(copy)])


def test_settings_that_are_refused_say_so_in_their_own_words_all_at_once(capsys, tmp_path):
    settings = ["--shard-rows", "0", "--sketch-dimension", "5", "--max-failed", "2"]
    said = message(capsys, ["score", "--model", "m", "--data", "d", "--out", str(tmp_path / "s"), *settings])
    assert said.startswith(
        "error: 3 problems:\n1. shard_rows is too small\n  got:     0\n  allowed: 1 or more\n2. sketch_"
    )
    assert said.rstrip().endswith("next:    selector score --help")
    assert "dummy" not in said


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [(["score", "--help"], 0, "--tokens-per-batch"), (["score", "--precision", "low"], 2, "invalid choice 'low'")],
)
def test_help_and_words_that_cannot_be_read_are_shown_once(capsys, words, code, part):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count(part) == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "selector", *arguments]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
"""Environment of the processes that tests start side by side."""


def test_killed_run_is_finished_by_the_same_command(tmp_path):
    out = tmp_path / "features"
    arguments = command("score", "--model", str(TINY_MODEL), "--data", str(POOL), "--out", str(out), "--limit", "60", "--shard-rows", "8",
                        "--tokens-per-batch", "1024", *SMALL)  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 120
    while len(list(out.glob("shards/*.parquet"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name for path in out.glob("shards/*.parquet")}
    assert len(done) >= 2
    subprocess.run(arguments, check=True, capture_output=True, env=ONE_THREAD)
    store = FeatureStore.open(out)
    assert store.verify() == []
    assert len(store) == 60
    assert done <= {path.name for path in store.shard_paths()}
    assert list(out.rglob(".*.tmp-*")) == []


def test_two_ranks_give_the_features_of_one(scored, tmp_path):
    out = tmp_path / "features"
    arguments = [
        "-m",
        "selector",
        "score",
        "--model",
        str(TINY_MODEL),
        "--data",
        str(POOL),
        "--out",
        str(out),
        "--id-column",
        "id",
        "--limit",
        "24",
        *SMALL,
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ]
    done = subprocess.run(
        [*launcher, *arguments], env=ONE_THREAD | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = FeatureStore.open(scored), FeatureStore.open(out)
    assert two.manifest.cost[-1]["processes"] == 2
    assert two.verify() == []
    assert two.ids.tolist() == one.ids.tolist()
    for name in ("effective_rank", "nuclear_norm", "frobenius_norm", "spectral_norm"):
        np.testing.assert_allclose(two.features(name), one.features(name), rtol=1e-5)
