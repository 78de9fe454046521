"""Report tables against plain NumPy, and what a report refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from selector.config import ScoreConfig
from selector.errors import DataError, GradientIndexError, SelectionError, StoreError
from selector.index import GradientIndex
from selector.report import Evidence, build_report, render
from selector.report.shapes import forms
from selector.report.svg import Axis, number, text_of
from selector.scorer import explain, score_dataset
from selector.scorer.explain import token_texts
from selector.scores import score, spearman
from selector.selecting import matched_random, select
from selector.store import FeatureStore

CONFIG = ScoreConfig(id_column="id", tokens_per_batch=2048, max_length=200, truncation="skip", max_failed=0.5)

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "</style></script><svg onload=window.hacked=1>{{ 7 * 7 }}",
    "javascript:window.hacked=1 \u202e \x07 end",
]


@pytest.fixture(scope="module")
def rows(pool) -> datasets.Dataset:
    """Thirty rows, four of them hostile in id, source and text."""
    rows = [dict(row) for row in pool.select(range(60)) if len(row["prompt"] + row["completion"]) < 500][:30]
    for row, text in zip(rows, HOSTILE, strict=False):
        row |= {"id": f"{text} id", "source": text, "prompt": f"{text} prompt", "completion": f"{text} completion"}
    rows[7]["completion"] = "too long " * 300
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def store(model, tokenizer, rows, tmp_path_factory) -> FeatureStore:
    return score_dataset(model, tokenizer, rows, tmp_path_factory.mktemp("report") / "features", CONFIG)


@pytest.fixture(scope="module")
def evidence(store, model, tokenizer, rows) -> Evidence:
    """A store with explanations, two scores, a selection with its control, texts and an index."""
    scores = {name: score(store, name) for name in ("effective_rank", "nuclear_norm")}
    selection = select(scores["effective_rank"], budget=8)
    explain(model, tokenizer, rows, store.path, [str(selection.ids[0]), str(rows[0]["id"])], CONFIG)
    return Evidence(
        store=store, scores=scores, selections={"chosen": selection}, controls={"chosen": matched_random(selection, scores["effective_rank"])},
        dataset=rows, index=GradientIndex.build(store),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(evidence):
    return build_report(evidence)


def test_layer_means_are_geometric_means_of_each_group(report, evidence):
    table = report.tables["layers"].to_pylist()
    features = {name: evidence.store.features(name) for name in ("effective_rank", "frobenius_norm", "spectral_norm")}
    features["stable_rank"] = np.square(features["frobenius_norm"] / features["spectral_norm"])
    specs = [(spec.layer, spec.projection) for spec in evidence.store.layers]
    groups = {
        "pool": np.flatnonzero(np.isfinite(evidence.scores["effective_rank"].values)),
        "chosen": evidence.selections["chosen"].rows,
    }
    checked = 0
    for entry in table:
        if entry["group"] in groups and entry["measure"] in features:
            values = features[entry["measure"]][
                groups[entry["group"]], specs.index((entry["layer"], entry["projection"]))
            ]
            assert entry["mean"] == pytest.approx(np.exp(np.log(values).mean()), rel=1e-5)
            assert entry["samples"] == len(values)
            checked += 1
        if entry["group"] == "pool":
            assert entry["ratio_to_pool"] == pytest.approx(1)
    assert checked == 2 * 4 * len(specs)


def test_cells_and_distributions_count_every_sample_once(report, evidence):
    cells, scored = report.tables["cells"].to_pandas(), int(np.isfinite(evidence.scores["effective_rank"].values).sum())
    counts = cells.groupby(["score", "form", "group"])["samples"].sum()
    assert (counts.xs("pool", level="group") == scored).all()
    assert (counts.xs("chosen", level="group") == 8).all()
    shares = report.tables["distributions"].to_pandas().groupby(["variable", "group"])["share"].sum()
    np.testing.assert_allclose(shares, 1)


def test_correlations_are_of_the_measure_itself_not_of_its_direction(report, evidence):
    """Norms are selected low first, so their score is negated; people are shown the norm."""
    found = {entry["score"]: entry for entry in report.tables["correlations"].to_pylist()}
    for name, scores in evidence.scores.items():
        for form, values in forms(scores).items():
            assert found[name][form] == pytest.approx(spearman(values, scores.n_tokens))


def test_comparison_holds_pool_selection_and_control(report, evidence):
    pool, chosen, control = report.tables["comparison"].to_pylist()
    assert (pool["samples"], chosen["samples"]) == (29, 8)
    assert control["group"] == "chosen: matched random"
    assert control["tokens"] <= chosen["tokens"]
    assert pool["longer_than_pool"] == pytest.approx(0.5)
    assert chosen["jaccard_with_first"] == 1


def test_samples_are_shown_once_with_the_text_of_their_row(report, rows):
    table = report.tables["samples"].to_pylist()
    assert len({entry["sample_id"] for entry in table}) == len(table)
    for entry in table:
        assert {part["role"]: part["text"] for part in entry["parts"]}["prompt"] == rows[entry["row"]]["prompt"]
    assert [entry["status"] for entry in table if entry["kind"] == "failed"] == ["too_long"]
    assert report.tables["refused"].to_pylist() == [
        {"by": "scoring", "reason": "too_long", "samples": 1}, {"by": "chosen", "reason": "no score", "samples": 1},
    ]  # fmt: skip


def test_report_needs_neither_selection_nor_texts_nor_index(store):
    report = build_report(Evidence(store=store, scores={"loss": score(store, "loss")}))
    page = render(report)
    assert "Nothing yet" in page
    assert "No index was given" in page
    assert "--data" in page


def test_tables_can_be_kept_as_parquet(report, tmp_path):
    import pyarrow.parquet as pq

    report.save(tmp_path / "tables")
    for name, table in report.tables.items():
        assert pq.read_table(tmp_path / "tables" / f"{name}.parquet").num_rows == len(table)


def test_other_data_is_refused(evidence, rows):
    for other in (rows.select(range(10)), rows.select(list(reversed(range(30))))):
        with pytest.raises(DataError, match="not the data set that was scored"):
            build_report(dataclasses.replace(evidence, dataset=other))


def test_selection_scores_and_index_of_another_store_are_refused(evidence, model, tokenizer, rows, tmp_path):
    other = score_dataset(model, tokenizer, rows.select(range(10, 20)), tmp_path / "other", CONFIG)
    scores = score(other)
    with pytest.raises(SelectionError, match="scores are not of this store"):
        build_report(dataclasses.replace(evidence, scores={"effective_rank": scores}))
    with pytest.raises(SelectionError, match="not in the store"):
        build_report(dataclasses.replace(evidence, store=other, scores={"effective_rank": scores}))
    with pytest.raises(GradientIndexError, match="belongs to another store"):
        build_report(Evidence(store=other, scores={"effective_rank": scores}, index=evidence.index))
    with pytest.raises(StoreError, match="belongs to another run"):
        explain(model, tokenizer, rows, other.path, [str(rows[12]["id"])], CONFIG)


def test_contributions_and_spectra_are_those_of_the_gradients(report, store, model, tokenizer, rows):
    """Each layer's inputs and output gradients from plain hooks; each weight's gradient from autograd."""
    entry = report.tables["explanations"].to_pylist()[0]
    row = next(row for row in rows if row["id"] == entry["sample_id"])
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
    seen: dict[str, list[torch.Tensor]] = {}
    names = [spec.name for spec in store.layers]
    modules = {name: module for name, module in model.named_modules() if name in names}
    model = model.eval().double()
    handles = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: [i[0], o]}) or o.retain_grad())
        for n, m in modules.items()
    ]
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, : len(prompt)] = -100
    model(input_ids=tokens, labels=labels).loss.backward()
    squares = sum(seen[n][0][0].square().sum(-1) * seen[n][1].grad[0].square().sum(-1) for n in names)
    np.testing.assert_allclose(entry["contribution"], (squares / len(names)).sqrt().detach(), rtol=1e-3, atol=1e-7)
    for name, sigma in zip(names, entry["spectra"], strict=True):
        expected = torch.linalg.svdvals(modules[name].weight.grad)[: len(sigma)]
        np.testing.assert_allclose(sigma, expected, rtol=1e-3, atol=1e-3 * expected[0].item())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.float()
    assert "".join(entry["tokens"]) == tokenizer.decode(ids)


def test_explaining_again_replaces_and_keeps(evidence, model, tokenizer, rows):
    from selector.store.explanations import read_explanations

    store = evidence.store
    before = read_explanations(store.path, store.manifest.fingerprint)
    explain(model, tokenizer, rows, store.path, [before["sample_id"][0].as_py()], CONFIG)
    after = read_explanations(store.path, store.manifest.fingerprint)
    assert sorted(after["sample_id"].to_pylist()) == sorted(before["sample_id"].to_pylist())
    with pytest.raises(DataError, match="2 problems") as caught:
        explain(model, tokenizer, rows, store.path, ["nobody", str(rows[7]["id"])], CONFIG)
    assert "name no sample" in str(caught.value)
    assert "have no gradient" in str(caught.value)


@pytest.mark.parametrize("text", ["plain words", "naïve 日本語 🙂🙂", "  spaces\n\n\tand lines ", "<|im_start|>"])
def test_token_texts_add_up_to_the_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_hostile_text_is_shown_and_never_markup(report):
    page = render(report)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "onload=window" not in page.replace("&lt;svg onload=window", "")
    assert "&lt;script&gt;window.hacked = 1&lt;/script&gt; prompt" in page
    assert "{{ 7 * 7 }}" in page
    assert "\u202e" not in page
    assert "⟨U+202E⟩ ⟨U+0007⟩ end" in page


def test_page_asks_for_nothing_from_elsewhere(report):
    page = render(report)
    for word in ("http:", "https:", "src=", "@import", "url("):
        assert word not in page.replace("img src=x", "")


def test_numbers_axes_and_text_for_people():
    assert [number(v) for v in (0, 12, 1234567.0, 0.1234, 1e-9, None, float("nan"))] == [
        "0",
        "12",
        "1.23e+06",
        "0.123",
        "1e-09",
        "–",
        "–",
    ]
    assert Axis("x", 10, 2000, logarithmic=True).ticks() == [10, 30, 100, 300, 1000]
    np.testing.assert_allclose(Axis("x", 1, 100, logarithmic=True).place(np.array([1.0, 10.0, 100.0])), [0, 0.5, 1])
    assert Axis("x", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert str(text_of("<b>\x00\u2066")) == "&lt;b&gt;⟨U+0000⟩⟨U+2066⟩"


def test_command_finds_scores_control_and_texts_by_itself(store, rows, tmp_path, capsys):
    from selector.cli import main

    rows.to_json(tmp_path / "rows.jsonl")
    assert main(["select", str(store.path), "--budget", "20%", "--out", str(tmp_path / "sel")]) == 0
    arguments = [
        "report",
        str(store.path),
        str(tmp_path / "sel"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "report.html"),
    ]
    assert main([*arguments, "--tables", str(tmp_path / "tables")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "sel: matched random" in page
    assert rows[10]["prompt"][:20] in page or rows[11]["prompt"][:20] in page
    assert (Path(tmp_path) / "tables" / "layers.parquet").exists()
    assert main([*arguments[:3], str(tmp_path / "sel"), *arguments[3:]]) == 2
    assert "two selections have one name" in capsys.readouterr().err
