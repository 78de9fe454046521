"""Evidence of what scores say of labelled data: its statistics against other libraries, its contrasts, and all stages in miniature."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import somersd
from sklearn.metrics import roc_auc_score

EVIDENCE = Path(__file__).resolve().parent.parent / "benchmarks" / "evidence"
sys.path.insert(0, str(EVIDENCE))

import bootstrap  # noqa: E402
import claims  # noqa: E402
import contrasts  # noqa: E402
import findings  # noqa: E402
import measured  # noqa: E402
import weighing  # noqa: E402


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_concordance_is_somers_d_and_the_area_under_the_curve(rows):
    scores, levels = np.array(rows, dtype=np.float64).T
    order = bootstrap.concordance(scores, levels, np.ones((1, len(rows)), dtype=np.float32))
    if len(set(levels)) < 2:
        assert np.isnan(order.value)
        return
    if len(set(scores)) > 1:  # SciPy has no value where all scores are equal
        assert order.value == pytest.approx((1 + somersd(levels, scores).statistic) / 2)
    if len(set(levels)) == 2:
        assert order.value == pytest.approx(roc_auc_score(levels == levels.max(), scores))


def test_resampled_values_are_those_of_the_rows_drawn():
    rng = np.random.default_rng(1)
    scores, levels = rng.normal(size=30), rng.integers(0, 3, size=30).astype(np.float64)
    groups = rng.integers(0, 12, size=30)
    weights = bootstrap.resamples(groups, 5)
    order = bootstrap.concordance(scores, levels, weights)
    pairs = bootstrap.paired(scores[0::2], scores[1::2], weights[:, 0::2])
    for b, own in enumerate(weights[1:]):
        assert all(len(set(own[groups == g])) == 1 for g in np.unique(groups))  # whole groups
        drawn = np.repeat(np.arange(30), own.astype(int))
        again = bootstrap.concordance(scores[drawn], levels[drawn], np.ones((1, len(drawn)), dtype=np.float32))
        assert order.resampled[b] == pytest.approx(again.value, abs=1e-6)
        wins = np.repeat(scores[0::2] > scores[1::2], own[0::2].astype(int))
        assert pairs.resampled[b] == pytest.approx(wins.mean())


def test_rows_without_a_score_are_left_out():
    scores = np.array([np.nan, 1.0, 2.0, 0.0])
    weights = np.ones((1, 4), dtype=np.float32)
    assert bootstrap.concordance(scores, np.array([1.0, 1.0, 0.0, 0.0]), weights).value == 0.5
    assert bootstrap.paired(scores[0::2], scores[1::2], weights[:, :2]).rows == 2


def test_holm_steps_down():
    np.testing.assert_allclose(bootstrap.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_a_clearly_better_order_is_found_and_an_equal_one_is_not():
    rng = np.random.default_rng(0)
    good, noise = rng.normal([[1.0], [0.0]], size=(2, 200)), rng.normal(size=(2, 200))
    weights = bootstrap.resamples(np.arange(200), 200)
    first, second = (bootstrap.paired(one, noise[0], weights) for one in (good[0], noise[1]))
    assert bootstrap.p_greater(first, second) < 1e-3
    assert bootstrap.p_greater(second, second) == 1.0


def rows_of_one_task(n: int) -> list[contrasts.Row]:
    rng = np.random.default_rng(0)
    return [
        contrasts.Row(f"r{i}", "s", f"question {i}", f"answer {i} " + "x" * int(rng.integers(5, 60))) for i in range(n)
    ]


def test_exchanged_answers_are_the_same_texts_in_the_same_half_and_of_like_length():
    pairs = contrasts.exchanged(rows_of_one_task(60))
    assert len(pairs) > 30
    right, wrong = zip(*(pair for pair, _ in pairs), strict=True)
    assert sorted(row.completion for row in right) == sorted(row.completion for row in wrong)
    for (own, other), _ in pairs:
        assert own.prompt == other.prompt
        assert own.completion != other.completion
        assert own.is_test == other.is_test
        assert abs(np.log(len(own.completion)) - np.log(len(other.completion))) <= contrasts.CALIPER
    assert len({row.id for row in right}) == len(right)
    answers = {row.completion: row.is_test for row in right}
    assert all(answers[row.completion] == row.is_test for row in wrong)  # no answer is in both halves


def test_halves_keep_like_prompts_together():
    a, b = contrasts.Row("a", "s", "Add  2 and 3.", "5"), contrasts.Row("b", "t", " add 2 and\n3. ", "five")
    assert a.prompt_hash == b.prompt_hash
    share = np.mean([row.is_test for row in rows_of_one_task(400)])
    assert 0.4 < share < 0.6


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 4)), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_matched_rows_are_of_like_length_and_levels_apart(rows):
    lengths, levels = np.array(rows, dtype=np.float64).T
    pairs = findings._matched(np.stack([lengths, lengths], axis=1), levels)
    assert len(set(pairs.tolist())) == len(pairs)
    assert np.all(levels[pairs[0::2]] > levels[pairs[1::2]])
    assert np.all(np.abs(lengths[pairs[0::2]] - lengths[pairs[1::2]]) <= findings.CALIPER)


def test_verdicts():
    def finding(low, high):
        return findings.Finding("c", "test", False, "loss", "none", (low + high) / 2, low, high, 10)

    above, below, across = finding(0.6, 0.7), finding(0.3, 0.4), finding(0.4, 0.6)
    assert findings.verdict(above, above, 1) == "holds"
    assert findings.verdict(below, below, -1) == "holds"
    assert findings.verdict(above, across, 1) == "length only"
    assert findings.verdict(above, below, 1) == "wrong sign"
    assert findings.verdict(below, across, 1) == "nothing"
    assert findings.verdict(above, above, 0) == "nothing expected"


def test_weights_are_found_and_carry_over_to_data_sets_not_seen():
    rng = np.random.default_rng(0)
    pairs = [rng.normal([0.8, 0.0, -0.8], size=(80, 3)) for _ in range(3)]
    weights = weighing.fit(pairs, 1.0)
    assert weights[0] > 0.3 > abs(weights[1])
    assert weights[2] < -0.3
    turned = weighing.fit([-pair for pair in pairs], 1.0)
    np.testing.assert_allclose(turned, -weights, atol=1e-3)


def labelled(folder: Path, pool: list[dict], heldout: list[dict]) -> None:
    """Embedded rows, cut short, under the names and labels of the data sets that the claims look at; labels mean nothing."""
    rows = sorted(pool, key=lambda row: len(row["prompt"]) + len(row["completion"]))[:90]
    rows = [
        {"id": row["id"], "prompt": row["prompt"][:80].strip(), "completion": row["completion"][:90].strip()}
        for row in rows
    ]

    def write(name: str, own: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")

    def some(first: int, count: int, prefix: str, **labels) -> list[dict]:
        own = rows[first : first + count]
        return [
            row | {"id": f"{prefix}-{row['id']}"} | {k: f(i) for k, f in labels.items()} for i, row in enumerate(own)
        ]

    whole = some(0, 12, "whole", q_expert=lambda i: 1)
    half = [
        row
        | {"id": f"half-{row['id']}", "completion": row["completion"][: len(row["completion"]) // 2 + 1], "q_expert": 0}
        for row in whole
    ]
    write("car_expert_revised", whole + half)
    flags = {flag: (lambda i, k=k: i % 4 == k) for k, flag in enumerate(contrasts.ALPACA_FLAGS.values())}
    write("alpaca_union_labeled", some(12, 24, "alpaca", unbiased_sample=lambda i: True, **flags))
    write(
        "layer_gradient_cot",
        [row | {"style": style, "id": f"{style}-{row['id']}"} for style in ("none", "simple", "detailed_gpt4o")
         for row in some(36, 14, "cot", task=lambda i: "gsm8k", index=lambda i: i, shuffled=lambda i: False)],
    )  # fmt: skip
    write(
        "math_levels",
        some(
            50,
            15,
            "math",
            has_solution=lambda i: True,
            level=lambda i: 1 + i % 5,
            limr_score=lambda i: (7 * i) % 11 / 11,
        ),
    )
    reference = some(65, 10, "flask", model=lambda i: "reference", difficulty=lambda i: contrasts.FLASK_LEVELS[i % 5])
    write(
        "flask_difficulty_skill",
        reference + [row | {"id": f"{m}-{row['id']}", "model": m} for m in ("gpt4", "alpaca_13b") for row in reference],
    )
    write("reasoning_r1_400", some(75, 8, "r1", in_gsm8k_test=lambda i: i % 2 == 0))
    write("gsm8k", [row | {"split": "test", "id": f"plain-{row['id']}"} for row in rows[75:83]])
    write(
        "lima",
        [
            row | {"n_turns": 2, "id": f"lima-{i}", "prompt": row["prompt"][:80], "completion": row["completion"][:90]}
            for i, row in enumerate(heldout[:8])
        ],
    )


def test_every_stage_runs_in_miniature(tmp_path, pool, monkeypatch, capsys):
    data, out, results = tmp_path / "data", tmp_path / "out", tmp_path / "results"
    data.mkdir()
    heldout = contrasts.read(Path(claims.__file__).parents[2] / "selector" / "assets" / "heldout.jsonl")
    labelled(data, list(pool), heldout)
    monkeypatch.setattr(findings, "FEWEST", 2)
    monkeypatch.setattr(findings, "RESAMPLES", 40)

    def run(*words: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, words)])
        claims.main()

    tiny = Path(claims.__file__).parents[2] / "selector" / "assets" / "tiny"
    run("rows", "--data", data, "--out", out, "--limit", 14)
    run("score", "--model", tiny, "--out", out, "--device", "cpu")
    first = (out / f"tiny{measured.SUFFIX}").read_bytes()
    again = measured.Measured.load(out / f"tiny{measured.SUFFIX}")
    dataclasses.replace(again, model="again").save(out / f"again{measured.SUFFIX}")
    run("table", "--data", data, "--out", out, "--limit", 14, "--results", results)
    (report,) = results.glob("evidence_claims_*.json")
    content = json.loads(report.read_text())
    names = [contrast.name for contrast in contrasts.build(data, 14)]
    assert len(names) == 18  # all of them, but for right over exchanged of encyclopedia articles
    for model in ("tiny", "again"):
        own = content["models"][model]
        assert set(own["auc"]) == set(names)
        scores = own["auc"]["math level"]["test, as is"]
        assert {"loss", "ifd", "effective_rank, mlp", "nuclear_norm, late", "angle_concentration", "random"} <= set(
            scores
        )
        assert set(scores["loss"]) == set(measured.CONTROLS)
        assert {"spectra + loss + ifd", "loss", "effective_rank"} <= {one["score"] for one in own["for all contrasts"]}
        assert any(name.endswith("matched") for name in own["sizes"])
    # one model under two names says the same of everything
    assert content["models"]["tiny"]["auc"] == content["models"]["again"]["auc"]
    assert all(one["Spearman of rows, raw"] == 1 for one in content["families"])
    text = report.with_suffix(".md").read_text()
    assert "## One number for all contrasts" in text
    assert text.strip() in capsys.readouterr().out
    assert b"question" not in first
    (out / f"again{measured.SUFFIX}").unlink()
    with pytest.raises(SystemExit, match="scored on other rows"):
        run("table", "--data", data, "--out", out, "--results", results)


def test_something_is_expected_of_every_score_on_every_contrast():
    expectations = findings._expectations()
    for entry in (
        *expectations["scores"].values(),
        *(one for own in expectations["exceptions"].values() for one in own.values()),
    ):
        assert entry["sign"] in (-1, 0, 1)
        assert entry["why"]
    assert findings.expected_sign("effective_rank, mlp", "expert-revised") == 1
    assert findings.expected_sign("loss", "math level") == 1


def test_labelled_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="wanted alpaca_union_labeled"):
        contrasts.build(tmp_path)
