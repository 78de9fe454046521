"""Scores of forward passes through the command line and the store: alone and beside spectra, from scoring to a report."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from selector.assets import POOL, TINY_MODEL
from selector.cli import main
from selector.config import ScoreConfig
from selector.errors import ConfigError, StoreError
from selector.forward import scorers
from selector.scorer import score_dataset
from selector.scores import Aggregation, available, length_correlation, score
from selector.selection import Selection
from selector.store import FeatureStore

ROWS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[Path]:
    """The first rows of the pool: fewer, and all."""
    folder = tmp_path_factory.mktemp("data")
    lines = POOL.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
    found = [folder / "some.jsonl", folder / "all.jsonl"]
    found[0].write_text("".join(lines[:25]), encoding="utf-8")
    found[1].write_text("".join(lines), encoding="utf-8")
    return found


def command(data: Path, out: Path, *names: str, options: tuple[str, ...] = ()) -> list[str]:
    return ["score", "--model", str(TINY_MODEL), "--data", str(data), "--out", str(out), *options, "--with", *names]


@pytest.fixture(scope="module")
def cheap(data, tmp_path_factory) -> Path:
    """Forward passes alone."""
    out = tmp_path_factory.mktemp("cheap") / "store"
    assert main(command(data[1], out, "loss", *scorers)) == 0
    return out


@pytest.fixture(scope="module")
def both(data, tmp_path_factory) -> Path:
    """Spectra and scores in one pass."""
    out = tmp_path_factory.mktemp("both") / "store"
    assert (
        main(command(data[1], out, "spectra", *scorers, options=("--limit", "12", "--projections", "q", "down"))) == 0
    )
    return out


def column(store: Path, name: str) -> np.ndarray:
    return FeatureStore.open(store).to_arrow([name])[name].to_numpy()


def test_store_of_forward_passes_goes_all_the_way_to_a_report(cheap, tmp_path, capsys):
    store = FeatureStore.open(cheap)
    assert store.layers == ()
    assert store.to_arrow().schema.names[-4:] == list(scorers)
    capsys.readouterr()
    assert main(["info", str(cheap)]) == 0
    assert "no spectra were measured" in (told := capsys.readouterr().out)
    assert "ifd" in told
    assert main(["verify", str(cheap)]) == 0
    assert main(["select", str(cheap), "--by", "ifd", "--budget", "25%", "--out", str(tmp_path / "picked")]) == 0
    picked = Selection.load(tmp_path / "picked" / "selection.parquet")
    scores = score(store, "ifd")
    assert set(picked.ids) == set(scores.ids[np.argsort(-scores.values)[: ROWS // 4]])
    assert scores.provenance["higher_first"] is True
    assert abs(length_correlation(score(store, "logit_nuclear_norm")).controlled) < 0.35
    assert length_correlation(score(store, "logit_nuclear_norm")).raw > 0.9
    report = [str(cheap), str(tmp_path / "picked"), "--out"]
    assert main(["report", *report, str(tmp_path / "report.html")]) == 0
    assert "angle concentration" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(cheap), "--out", str(tmp_path / "other.html")]) == 0
    pytest.importorskip("matplotlib")
    assert main(["plot", *report, str(tmp_path / "figures")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["select", "STORE", "--budget", "5", "--out", "OUT"], ("holds no spectra", "say what to score by", "ifd")),
        (["select", "STORE", "--by", "idf", "--out", "OUT"], ("does not hold", "did you mean 'ifd'")),
        (["index", "STORE", "--out", "OUT"], ("holds no spectra", "spectra among --with")),
    ],
)
def test_what_needs_spectra_says_so(cheap, tmp_path, capsys, arguments, words):
    assert main([word.replace("STORE", str(cheap)).replace("OUT", str(tmp_path / "o")) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_scores_beside_spectra_are_those_of_forward_passes_alone(cheap, both):
    for name in ("loss", *scorers):
        np.testing.assert_allclose(column(both, name), column(cheap, name)[:12], rtol=1e-5)
    assert FeatureStore.open(both).features("effective_rank").shape == (12, 12)


def test_resume_append_replay_and_merge(data, cheap, tmp_path, capsys):
    out = tmp_path / "store"
    assert main(command(data[0], out, "ifd", options=("--limit", "10"))) == 0
    assert main(command(data[0], out, "ifd")) == 0
    assert main(command(data[1], out, "ifd", "loss", options=("--append",))) == 0
    assert [entry["samples"] for entry in FeatureStore.open(out).manifest.cost] == [10, 15, 15]
    np.testing.assert_allclose(column(out, "ifd"), column(cheap, "ifd"), rtol=1e-5)
    assert main(["run", str(out), "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_allclose(column(tmp_path / "again", "ifd"), column(out, "ifd"), rtol=1e-6)
    shutil.copytree(out, tmp_path / "part")
    (next((tmp_path / "part" / "shards").glob("*.parquet"))).unlink()
    assert main(["merge", str(tmp_path / "part"), str(out), "--out", str(tmp_path / "joined")]) == 0
    np.testing.assert_array_equal(column(tmp_path / "joined", "ifd"), column(out, "ifd"))
    assert main(["verify", str(tmp_path / "part"), "--repair"]) == 0
    np.testing.assert_allclose(column(tmp_path / "part", "ifd"), column(out, "ifd"), rtol=1e-5)
    capsys.readouterr()
    assert main(command(data[1], out, "loss")) == 2
    assert "scores differs" in (told := capsys.readouterr().err)
    assert "got:     none" in told
    assert "allowed: ifd" in told


def test_dry_run_says_what_is_computed(data, tmp_path, capsys):
    assert main([*command(data[0], tmp_path / "o", "ifd"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "loss, ifd; no backward pass, no spectra" in told
    assert "times an epoch of training" in told
    assert not (tmp_path / "o").exists()


def test_unknown_scorers_and_missing_data_are_told_together(tmp_path, capsys):
    assert main(command(tmp_path / "nothing.jsonl", tmp_path / "o", "idf", "spectra")) == 2
    told = capsys.readouterr().err
    assert "did you mean 'ifd'" in told
    assert "nothing.jsonl" in told
    assert not (tmp_path / "o").exists()


def test_explaining_needs_spectra(data, tmp_path, capsys):
    assert main(command(data[0], tmp_path / "o", "ifd", options=("--explain", "x"))) == 2
    assert "add spectra to --with" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_settings_survive_as_yaml_without_the_field(both):
    """Settings of before there were scorers say nothing of them."""
    from selector.config import from_mapping, load_yaml

    settings = load_yaml(both / "config.yaml")["config"]
    assert settings.pop("scorers") == ["spectra", *scorers]
    assert from_mapping(ScoreConfig, settings, "old").scorers == ("spectra",)


def test_scores_that_need_no_pass(both):
    store = FeatureStore.open(both)
    table = store.to_arrow(["sample_id", "n_tokens", "n_loss_tokens", "loss"]).to_pydict()
    tokens, learned = np.array(table["n_tokens"]), np.array(table["n_loss_tokens"])
    for name, expected in {"n_tokens": tokens, "prompt_tokens": tokens - learned, "response_tokens": learned}.items():
        found = score(store, name)
        np.testing.assert_array_equal(found.raw, expected)
        np.testing.assert_array_equal(found.values, expected)
    np.testing.assert_allclose(score(store, "perplexity").raw, np.exp(table["loss"]), rtol=1e-6)
    first, again, other = (score(store, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)
    assert ((first.raw >= 0) & (first.raw < 1)).all()
    assert first.provenance["seed"] == 1
    difference = score(store, "layer_profile_difference", aggregation=Aggregation(projections=("q",))).raw
    norms = store.features("nuclear_norm")[:, [spec.projection == "q" for spec in store.layers]]
    np.testing.assert_allclose(difference, np.abs(np.diff(norms.astype(float), axis=1)).mean(1), rtol=1e-6)


def test_bands_and_projections_are_reached_from_the_command_line(both, tmp_path):
    assert main(["select", str(both), "--budget", "3", "--out", str(tmp_path / "o"), "--control", "none",
                 "--aggregation.projections", "q", "--aggregation.depth", "0", "0.4"]) == 0  # fmt: skip
    picked = Selection.load(tmp_path / "o" / "selection.parquet")
    wanted = score(
        FeatureStore.open(both), control="none", aggregation=Aggregation(projections=("q",), depth=(0.0, 0.4))
    )
    assert set(picked.ids) == set(wanted.ids[np.argsort(-wanted.values)[:3]])
    assert (
        main(["select", str(both), "--budget", "3", "--out", str(tmp_path / "p"), "--by", "layer_profile_difference"])
        == 0
    )
    assert (
        main(["select", str(both), "--budget", "3", "--out", str(tmp_path / "r"), "--by", "random", "--seed", "7"]) == 0
    )
    drawn = Selection.load(tmp_path / "r" / "selection.parquet")
    expected = score(FeatureStore.open(both), "random", seed=7)
    assert set(drawn.ids) == set(expected.ids[np.argsort(-expected.values)[:3]])


def test_pairs_and_groups_have_scores_but_no_perplexity(small_llama, tokenizer, tmp_path):
    """A sample of several sequences has one score; what its loss is of does not change it."""
    config = ScoreConfig(scorers=tuple(scorers))
    rows = [{"prompt": f"Say {word} twice:", "chosen": f" {word} {word}.", "rejected": f" not {word}, no."} for word in ("a", "tree", "house")]  # fmt: skip
    pairs = score_dataset(small_llama, tokenizer, datasets.Dataset.from_list(rows), tmp_path / "pairs", config)
    assert column(tmp_path / "pairs", "loss") == pytest.approx([math.log(2)] * 3)
    groups = [
        {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "advantages": [1.0, -1.0]} for r in rows
    ]
    score_dataset(small_llama, tokenizer, datasets.Dataset.from_list(groups), tmp_path / "groups", config)
    for name in scorers:
        values = column(tmp_path / "pairs", name)
        assert np.isfinite(values).all()
        assert len(set(values.tolist())) == 3
    assert "perplexity" not in available(pairs)
    with pytest.raises(ConfigError, match="does not hold"):
        score(pairs, "perplexity")
    with pytest.raises(StoreError, match="holds no spectra"):
        pairs.features("nuclear_norm")


def test_failed_samples_have_no_number(small_llama, tokenizer, tmp_path):
    rows = [{"prompt": "Say yes:", "completion": " yes, yes"}, {"prompt": "Say:" * 200, "completion": " no"}]
    config = ScoreConfig(scorers=("ifd",), max_length=64, truncation="skip", max_failed=1.0)
    store = score_dataset(small_llama, tokenizer, datasets.Dataset.from_list(rows), tmp_path / "s", config)
    assert store.to_arrow(["status", "loss", "ifd"]).to_pydict()["status"] == ["ok", "too_long"]
    assert np.isnan(column(tmp_path / "s", "ifd")).tolist() == [False, True]
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["identity"]["scores"]["ifd"]["unit"] == "ratio"
