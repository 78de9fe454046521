"""Selection from the command line beyond a plain top: targets, files of policies, predicted scores, comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from selector.assets import TINY_MODEL
from selector.cli import main
from selector.cli.predict import words
from selector.index import GradientIndex
from selector.scores import read_scores, spearman
from selector.selection import Selection
from selector.store import StoreWriter
from selector.store.schema import Manifest
from selector.store.writer import create
from selector.types import MEASURES, LayerSpec

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
N, SCORED = 360, 240


@pytest.fixture(scope="module")
def pool(tmp_path_factory, tokenizer) -> Path:
    """A pool of made-up words and, beside it, a store of its first rows, whose ranks follow from words and lengths."""
    from selector.scorer.models import tokenizer_fingerprint

    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    vocabulary = np.array(["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "moon", "tea", "milk"])
    worth = rng.normal(size=len(vocabulary))
    drawn = [rng.integers(0, len(vocabulary), rng.integers(8, 40)) for _ in range(N)]
    rows = [
        {"name": f"r{i}", "source": "ab"[i % 2], "prompt": "say:", "completion": " ".join(vocabulary[words])}
        for i, words in enumerate(drawn)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "worth.npy", [worth[words].mean() for words in drawn])
    layers = tuple(
        LayerSpec(name=f"layers.{i}.q", layer=i, projection="q", in_features=8, out_features=8) for i in range(2)
    )
    identity = {"tokenizer": tokenizer_fingerprint(tokenizer), "max_length": 512}
    command = {"command": "score", "model": str(TINY_MODEL), "config": {"id_column": "name"}}
    manifest = Manifest(identity=identity, layers=layers, expected=SCORED, command=command)
    create(folder / "features", manifest)
    writer = StoreWriter(folder / "features", manifest)
    for i, words_ in enumerate(drawn[:SCORED]):
        length = len(words_)
        others = {name: np.exp(rng.normal(size=2)).astype(np.float32) for name in MEASURES}
        rank = np.exp(0.8 * np.log(length) + worth[words_].mean() + 0.02 * rng.normal(size=2)).astype(np.float32)
        writer.add(
            {
                "sample_id": f"r{i}", "row": i, "source": "ab"[i % 2], "n_tokens": length + 3, "n_loss_tokens": length,
                "truncated": False, "status": "ok", "loss": 2.0, **others, "effective_rank": rank,
            }
        )  # fmt: skip
    writer.flush()
    return folder


def test_a_score_is_predicted_and_selected_from(pool, tmp_path, capsys):
    predict = ["predict", str(pool / "features"), "--data", str(pool / "pool.jsonl"), "--out"]
    assert main([*predict, str(tmp_path / "p")]) == 0
    printed = capsys.readouterr().out
    assert "prediction of 24 held-out scores" in printed
    assert "length-controlled" in printed
    assert f"{SCORED} scores kept, {N - SCORED} predicted" in printed
    found = read_scores(tmp_path / "p" / "scores.parquet")
    worth = np.load(pool / "worth.npy")
    assert spearman(found.values[SCORED:], worth[SCORED:]) > 0.8
    assert found.provenance["predicted"]["spearman"] > 0.8
    assert found.provenance["predicted"]["interval"][0] > 0.5
    assert np.isfinite(found.raw).all()
    assert (np.diff(found.rows) == 1).all()
    assert (
        main(["select", str(tmp_path / "p" / "scores.parquet"), "--budget", "20%", "--out", str(tmp_path / "s")]) == 0
    )
    selection = Selection.load(tmp_path / "s" / "selection.parquet")
    assert worth[selection.rows].mean() > worth.mean() + worth.std()
    assert (selection.rows >= SCORED).any()
    assert main(["run", str(tmp_path / "p"), "--out", str(tmp_path / "q")]) == 0
    np.testing.assert_array_equal(read_scores(tmp_path / "q" / "scores.parquet").values, found.values)


def test_a_score_that_words_do_not_predict_is_refused(pool, tmp_path, capsys):
    rows = [json.loads(line) for line in (pool / "pool.jsonl").read_text().splitlines()]
    order = np.random.default_rng(1).permutation(N)
    for row, i in zip(rows, order, strict=True):
        row["name"] = f"r{i}"
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict = ["predict", str(pool / "features"), "--data", str(tmp_path / "mixed.jsonl"), "--out", str(tmp_path / "p")]
    assert main(predict) == 2
    assert "do not predict its score" in capsys.readouterr().err
    (tmp_path / "mixed.jsonl").write_text(
        "".join(json.dumps(row | {"name": f"x{i}"}) + "\n" for i, row in enumerate(rows))
    )
    assert main(predict) == 2
    assert "too few samples have a score" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_texts_of_a_row_are_read_in_any_layout():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"text": "b"}]}], "n": 3}
    assert list(words(row)) == ["a", "b"]


def test_policies_compose_in_a_file(pool, tmp_path):
    assert main(["index", str(pool / "features"), "--out", str(tmp_path / "index")]) == 0
    select = ["select", str(pool / "features"), "--index", str(tmp_path / "index"), "--policy"]
    assert main([*select, str(RECIPES / "diverse.yaml"), "--out", str(tmp_path / "a")]) == 0
    selection = Selection.load(tmp_path / "a" / "selection.parquet")
    assert selection.provenance["policy"] == "then"
    assert len(selection) == SCORED // 10
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert settings["policy"] == "then"
    assert settings["budget"] == "10%"
    assert main(["run", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    assert Selection.load(tmp_path / "b" / "selection.parquet").ids.tolist() == selection.ids.tolist()
    assert main([*select, str(RECIPES / "diverse.yaml"), "--budget", "7", "--out", str(tmp_path / "c")]) == 0
    assert len(Selection.load(tmp_path / "c" / "selection.parquet")) == 7


def test_the_worse_half_of_each_source_goes_and_chance_draws_from_the_rest(pool, tmp_path):
    select = ["select", str(pool / "features"), "--policy", str(RECIPES / "better_half.yaml"), "--out"]
    drawn = []
    for seed in ("0", "1"):
        assert main([*select, str(tmp_path / seed), "--seed", seed]) == 0
        drawn.append(set(Selection.load(tmp_path / seed / "selection.parquet").ids.tolist()))
    scores = read_scores(tmp_path / "0" / "scores.parquet")
    longest = scores.n_tokens.max()
    best: set[str] = set()
    for source in "ab":
        own = np.flatnonzero(scores.source == source)
        own = own[np.argsort(-scores.values[own])]
        spent = np.cumsum(scores.n_tokens[own])
        better = set(scores.ids[own[spent <= spent[-1] / 2 + longest]].tolist())
        for ids in drawn:
            picked = np.isin(scores.ids[own], list(ids))
            assert set(scores.ids[own[picked]].tolist()) <= better
            assert abs(scores.n_tokens[own[picked]].sum() - spent[-1] / 10) <= 2 * longest
        best |= set(scores.ids[own[spent <= spent[-1] / 10]].tolist())
    assert len(drawn[0] & drawn[1]) < len(drawn[0]) / 2
    assert len(drawn[0] & best) < len(best) / 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: []", "names no policy"),
        ("policy: top\nlow: 1", "has no option 'low'"),
        ("policy: than", "did you mean 'then'"),
        ("policy: then\nstages: [{policy: topp}]", "did you mean 'top'"),
        ("policy: top\nbudget: lots", "budget cannot be read"),
        ("- top", "holds no settings"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(pool, tmp_path, capsys, content, message):
    (tmp_path / "plan.yaml").write_text(content)
    assert (
        main(["select", str(pool / "features"), "--policy", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "s")])
        == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_targets_by_id_and_by_example(pool, tmp_path, capsys, monkeypatch):
    index, examples = tmp_path / "index", tmp_path / "examples.jsonl"
    assert main(["index", str(pool / "features"), "--out", str(index)]) == 0
    select = ["select", str(pool / "features"), "--budget", "9", "--out", str(tmp_path / "s"), "--index", str(index)]
    (tmp_path / "ids.txt").write_text("r7\nr50\n\n")
    match = ["--policy", "match-target", "--targets"]
    assert main([*select, *match, str(tmp_path / "ids.txt")]) == 0
    picked = Selection.load(tmp_path / "s" / "selection.parquet")
    assert not {"r7", "r50"} & set(picked.ids)
    opened = GradientIndex.open(index)
    vectors = opened.vectors[opened.positions(picked.ids.tolist())]
    nearest = vectors @ opened.vectors[opened.positions(["r7", "r50"])].T
    rest = opened.vectors @ opened.vectors[opened.positions(["r7", "r50"])].T
    assert nearest.max(axis=1).mean() > np.sort(rest.max(axis=1))[-30:].mean()
    # examples are placed in the index by the scorer, which has tests of its own
    examples.write_text('{"prompt": "say:", "completion": "tea"}\n')
    monkeypatch.setattr("selector.cli.foreign.place", lambda rows, store, index: np.ones((len(rows), 8), np.float32))
    assert main([*select, *match, str(examples)]) == 0
    assert Selection.load(tmp_path / "s" / "selection.parquet").provenance["target"] == "1 vectors"
    capsys.readouterr()
    for arguments, message in (
        ([*select, "--targets", str(examples)], "looks at no targets"),
        ([*select[:-2], *match, str(examples)], "compared in an index"),
        ([*select, *match, str(tmp_path / "none.txt")], "cannot be read"),
        (["select", str(tmp_path / "s" / "scores.parquet"), *select[2:], *match, str(examples)], "--indexed-store"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_two_selections_are_compared(pool, tmp_path, capsys):
    assert main(["index", str(pool / "features"), "--out", str(tmp_path / "index")]) == 0
    for name, policy in (("a", "top"), ("b", "bottom")):
        assert main(["select", str(pool / "features"), "--policy", policy, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--index", str(tmp_path / "index")]) == 0
    printed = capsys.readouterr().out
    assert "0.000" in printed
    assert "coverage" in printed
    assert "share of a" in printed
    own = tmp_path / "a" / "selection.parquet"
    assert main(["compare", str(own), str(tmp_path / "a" / "matched_random.parquet")]) == 0
    assert "by chance" in capsys.readouterr().out
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "selection.parquet"
    alone.write_bytes(own.read_bytes())
    assert main(["compare", str(alone), str(alone)]) == 2
    assert "the pool is not known" in capsys.readouterr().err
