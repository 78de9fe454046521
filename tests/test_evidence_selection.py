"""The benchmarks of evidence in miniature: every stage on the embedded model and rows, and what they must not get wrong."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest

from selector.assets import HELD_OUT, POOL, TINY_MODEL

EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "evidence"
pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """The scripts import one another by name, as those of one folder do."""
    monkeypatch.syspath_prepend(str(EVIDENCE))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data directory made of the embedded rows."""
    folder = tmp_path_factory.mktemp("data")
    train, heldout = rows_of(POOL), rows_of(HELD_OUT)
    gsm8k = [row | {"split": "train"} for row in train if row["source"] == "gsm8k"]
    gsm8k += [row | {"split": "test"} for row in heldout if row["source"] == "gsm8k"]
    parts = {"gsm8k": gsm8k, "dolly3k_high": [row for row in train if row["source"] == "dolly"]}
    question = "Which of these is a fruit?\nA. apple\nB. stone\nC. river\nD. cloud\nAnswer:"
    parts["eval_mmlu"] = [{"prompt": question, "completion": "A", "split": "test"}]
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def words(prompt, completion):
    return len((prompt + completion).split())


def test_pools_hold_noise_at_the_stated_rates_and_share_no_prompt(data):
    import pools

    sizes = pools.Sizes(test=160, development=80, evaluation=10, target=4, questions=1)
    parts = pools.build(data, sizes, words)
    again = pools.build(data, sizes, words)
    assert parts == again
    pool = parts["test"]
    assert len(pool) == 160
    originals = {row["id"]: row for row in pool}
    for kind, share in pools.NOISE_SHARES.items():
        assert abs(sum(row["noise"] == kind for row in pool) / len(pool) - share) < 0.03, kind
    written = {row["prompt"].strip() + "\n": row["completion"].strip() for row in rows_of(POOL)}
    for row in pool:
        if row["noise"] == "":
            assert row["completion"] == written[row["prompt"]]
        elif row["noise"] == "truncated":
            assert written[row["prompt"]].startswith(row["completion"])
        elif row["noise"] == "near_duplicate":
            assert originals[row["copy_of"]]["noise"] == ""
        else:
            assert row["completion"] in set(written.values()) - {written[row["prompt"]]}
    distinct = [
        pools.normalized(row["prompt"]) for rows in parts.values() for row in rows if row["noise"] != "near_duplicate"
    ]
    assert len(distinct) == len(set(distinct))
    with pytest.raises(ValueError, match="ask for fewer"):
        pools.build(data, pools.Sizes(test=4000), words)


def test_intervals_are_those_of_students_t():
    from paired import interval, t_quantile

    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 40):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)
    values = [0.1, 0.4, -0.2, 0.3, 0.15]
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-5)
    assert not found.excludes_zero
    assert interval([1.0]).low is None
    assert not interval([1.0]).excludes_zero
    assert not interval([2.0, 2.0]).excludes_zero


def test_steps_to_a_goal_count_a_run_that_misses_it_as_one_look_more():
    from curves import measures

    found = measures({0: np.array([0.1, 0.2, 0.4, 0.3]), 1: np.array([0.1, 0.1, 0.1, 0.1])}, 0.4, 5)
    assert found["steps"] == {0: 10, 1: 20}
    assert found["area"][0] == pytest.approx(0.25)
    assert found["last"][0] == pytest.approx(0.3)


def test_workers_skip_finished_runs_and_bear_a_line_cut_short(tmp_path):
    import workers

    runs = [{"seed": seed} for seed in range(6)]
    seen = []

    def do(run):
        seen.append(run["seed"])
        return {"value": run["seed"] ** 2}

    late = time.monotonic() + 60
    assert workers.work(tmp_path, "x", runs, do, (1, 2), late) == 3
    (tmp_path / "x-0.jsonl").write_text('{"run": {"seed": 0}, "val')
    assert workers.work(tmp_path, "x", runs, do, (0, 2), late) == 3
    assert workers.work(tmp_path, "x", runs, do, (0, 2), late) == 0
    assert seen == [1, 3, 5, 0, 2, 4]
    assert {one["run"]["seed"]: one["value"] for one in workers.finished(tmp_path, "x")} == {i: i * i for i in range(6)}
    assert workers.work(tmp_path, "y", runs, do, (0, 1), time.monotonic() - 1) == 0


def test_launched_processes_have_their_share_and_failures_are_counted(tmp_path):
    import workers

    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit('1/3' in sys.argv)\n")
    assert workers.launch(script, ["train"], tmp_path / "logs", 3, 0, 30) == 1
    logs = [(tmp_path / "logs" / f"worker-{i}.log").read_text() for i in range(3)]
    assert [f"{i}/3" in log for i, log in enumerate(logs)] == [True, True, True]


def test_a_training_starts_from_the_base_model_and_is_examined_itself():
    import torch
    from training import Bench, Examination, Settings

    rows = sorted(rows_of(POOL), key=lambda row: len(row["prompt"] + row["completion"]))[:24]
    heldout = sorted(rows_of(HELD_OUT), key=lambda row: len(row["prompt"] + row["completion"]))[:3]
    bench = Bench(str(TINY_MODEL), rows, Settings(epochs=1, tokens_per_step=128))
    examination = Examination(
        bench.tokenizer,
        [row | {"source": "dolly"} for row in heldout],
        [{"task": "t", "prompt": "2 + 2 =", "choices": [" 4", " 5"], "right": 0}],
    )
    before = examination(bench.base)
    model, facts = bench.train(range(12), 1e-3, 0)
    assert facts["steps"] > 1
    after = examination(model)
    assert after["loss"]["dolly"] != before["loss"]["dolly"]
    assert examination(bench.base) == before
    fresh = copy.deepcopy(bench.base)
    fresh.load_state_dict(model.state_dict())
    assert examination(fresh) == after
    again, _ = bench.train(range(12), 1e-3, 0)
    assert examination(again) == after
    # the loss is the mean over all tokens of the source's rows
    nats, tokens = 0.0, 0
    for row in heldout:
        prompt = bench.tokenizer(row["prompt"])["input_ids"]
        whole = bench.tokenizer(row["prompt"] + row["completion"] + bench.tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                fresh(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1], torch.tensor(whole[len(prompt) :])
            )
        nats, tokens = nats + float(loss) * (len(whole) - len(prompt)), tokens + len(whole) - len(prompt)
    assert after["loss"]["dolly"] == pytest.approx(nats / tokens, rel=1e-4)


def test_every_stage_of_the_evidence_of_selection(data, tmp_path, monkeypatch, capsys):
    import pools
    import selection

    monkeypatch.setattr(pools, "LONGEST", 128)  # short rows are quick
    monkeypatch.setattr(selection, "COST_ROWS", 4)
    monkeypatch.setattr(selection, "LEARNING_RATES", (1e-4,))
    monkeypatch.setattr(selection, "TUNING_SEEDS", (0,))
    sizes = {"test": 32, "development": 24, "evaluation": 2, "target": 2, "questions": 1}
    common = ["--model", "embedded", "--work", str(tmp_path), "--sizes", json.dumps(sizes), "--budgets", "20% tokens"]
    common += [
        "--seeds",
        "0",
        "1",
        "--methods",
        "random",
        "high effective_rank",
        "--epochs",
        "1",
        "--tokens-per-step",
        "512",
    ]
    assert selection.main(["pool", *common, "--data", str(data)]) == 0
    assert selection.main(["score", *common]) == 0
    assert selection.main(["tune", *common]) == 0
    assert selection.main(["train", *common]) == 0
    capsys.readouterr()
    assert selection.main(["table", *common, "--results", str(tmp_path / "results")]) == 0
    shown = capsys.readouterr().out
    assert "| high effective_rank |" in shown
    assert "Against random, of 1 methods" in shown
    (path,) = (tmp_path / "results").glob("evidence_selection_*.json")
    found = json.loads(path.read_text())
    (row,) = [row for row in found["tables"]["20% tokens"] if row["method"] == "high effective_rank"]
    assert row["to_random"]["n"] == row["to_matched"]["n"] == 2
    assert row["cost"] > 0
    spent = {run["run"]["method"]: run["tokens"] for run in found["runs"] if run["run"]["budget"]}
    assert max(spent.values()) < 1.3 * min(spent.values())
    assert set(spent) == {"random", "high effective_rank", "matched high effective_rank"}


def test_every_sampler_learns_from_two_steps_of_grpo(tmp_path, monkeypatch, capsys):
    import grpo

    monkeypatch.setattr(grpo, "WARM_AT", 0.0)
    common = ["--work", str(tmp_path), "--prompts", "32", "--steps", "2", "--every", "1", "--batch", "4"]
    common += ["--generations", "2", "--demonstrations", "32", "--seeds", "0"]
    assert grpo.main(["warm", *common]) == 0
    monkeypatch.setattr(grpo, "LEARNING_RATES", (1e-4,))
    monkeypatch.setattr(grpo, "TUNING_SEEDS", (7,))
    assert grpo.main(["tune", *common]) == 0
    assert grpo.main(["train", *common]) == 0
    assert grpo.main(["table", *common, "--results", str(tmp_path / "results")]) == 0
    shown = capsys.readouterr().out
    for sampler in grpo.SAMPLERS:
        assert f"| {sampler} |" in shown
