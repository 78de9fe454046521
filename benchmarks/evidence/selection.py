"""Does training on what a score selects give a better model than training on as many tokens at random?

    python benchmarks/evidence/selection.py pool  --data DATA --model MODEL
    python benchmarks/evidence/selection.py score --model MODEL
    python benchmarks/evidence/selection.py tune  --model MODEL --workers 8 --gpus 2
    python benchmarks/evidence/selection.py train --model MODEL --workers 8 --gpus 2 --seconds 400
    python benchmarks/evidence/selection.py table --model MODEL

Every stage continues where it was stopped. Pools hold clean rows and noise at known rates (see `pools.py`). All methods get
equal tokens, epochs and steps, and the learning rate that is best for a random selection of the development pool; the
combinations are fitted on that pool as well. Trained models are compared at the end of training on clean rows that are in
no pool, with paired differences over training seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pyarrow as pa
import pyarrow.parquet as pq
import workers

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (0, 1, 2)
BUDGETS = ("10% tokens", "30% tokens", "5% tokens")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
SKETCH = 16
"""Numbers per matrix of a sketch."""
COST_ROWS = 768
"""Rows on which the cost of each score is measured by itself."""
NOTHING = "nothing"
"""Name of the model before training."""

Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--model", required=True, help="checkpoint of a causal language model, or `embedded`")
    parser.add_argument("--data", type=Path, help="directory of the JSONL files, for `pool`")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/selection"), help="where everything is kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "results", help="for `table`")
    parser.add_argument("--suffix", default="", help="of the results' name, such as _tiny")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON of other sizes than those of `pools.Sizes`")
    parser.add_argument("--methods", nargs="*", help="only these methods; all when none is named")
    parser.add_argument("--budgets", nargs="*", default=BUDGETS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--workers", type=int, help="processes on each GPU, or in all without one")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--shard", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--seconds", type=float, default=540, help="that a stage of trainings may take")
    options = parser.parse_args(arguments)
    options.started = time.monotonic()
    if options.model == "embedded":
        from selector.assets import TINY_MODEL

        options.model = str(TINY_MODEL)
    return STAGES[options.stage](options)


def make_pools(options: argparse.Namespace) -> int:
    """Draw pools, evaluation rows, targets and questions."""
    from transformers import AutoTokenizer

    if options.data is None:
        raise SystemExit("pool needs --data DIR")
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def n_tokens(prompt: str, completion: str) -> int:
        return len(tokenizer(prompt + completion, verbose=False)["input_ids"]) + 1  # the end token

    sizes = pools.Sizes(**options.sizes)
    try:
        parts = pools.build(options.data, sizes, n_tokens)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    taken = {pools.normalized(row["prompt"]) for rows in parts.values() for row in rows}
    parts["questions"] = pools.choice_tasks(options.data, sizes, taken, n_tokens)
    folder = options.work / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows, {sum(row.get('noise', '') != '' for row in rows)} of them noise")
    return 0


def part(options: argparse.Namespace, name: str) -> list[pools.Row]:
    """Rows of a part that `pool` has drawn."""
    path = options.work / "parts" / f"{name}.jsonl"
    if not path.exists():
        raise SystemExit(f"there is no {path}: run the stage `pool` first")
    return list(pools.read_rows(path.parent, name))


def make_scores(options: argparse.Namespace) -> int:
    """Score both pools, fit the combinations on the development pool, and make every selection of both."""
    import datasets
    import torch
    from methods import COSTS, FORWARD, PARTS, Scored, fit_combination, methods

    from selector.config import ScoreConfig
    from selector.scorer import load_model, score_dataset
    from selector.store import FeatureStore

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, device=device)

    def scored(name: str, rows: list[pools.Row], scorers: tuple[str, ...], sketch: int) -> FeatureStore:
        config = ScoreConfig(id_column="id", sketch_dimension=sketch, scorers=scorers)
        data = datasets.Dataset.from_list(
            [{key: row[key] for key in ("id", "source", "prompt", "completion")} for row in rows]
        )
        return score_dataset(model, tokenizer, data, options.work / "features" / name, config)

    found = {}
    for name in ("development", "test"):
        store = scored(name, part(options, name), ("spectra", *FORWARD), SKETCH)
        found[name] = Scored(store, scored(f"{name}_target", part(options, f"{name}_target"), ("spectra",), SKETCH))
    sample = part(options, "test")[:COST_ROWS]
    costs = {NOTHING: 0.0}
    for name, scorers in COSTS.items():
        if scorers:
            sketch = SKETCH if "sketches" in name else 0
            store = scored(f"cost_{name.replace(', ', '_')}", sample, scorers, sketch)
            costs[name] = store.manifest.cost[-1]["epoch_ratio"]
    clean = np.array([row["noise"] == "" for row in part(options, "development")])
    ingredients = found["development"].ingredients
    weights = {
        name: fit_combination({key: one for key, one in ingredients.items() if belongs(key)}, clean)
        for name, belongs in PARTS.items()
    }
    chosen: list[dict[str, Any]] = []

    def keep(pool: str, method: str, budget: str, seed: int, rows: np.ndarray) -> None:
        chosen.append({"pool": pool, "method": method, "budget": budget, "seed": seed, "rows": rows.tolist()})

    known = methods(weights)
    for seed in TUNING_SEEDS:
        keep(
            "development",
            "random",
            BUDGETS[0],
            seed,
            known["random"].select(found["development"], BUDGETS[0], seed).rows,
        )
    from selector.selecting import matched_random

    pool = found["test"]
    for name, method in known.items():
        for budget in options.budgets:
            fixed = None if method.draws else method.select(pool, budget, 0)
            for seed in options.seeds:
                if fixed is None:
                    keep("test", name, budget, seed, method.select(pool, budget, seed).rows)
                else:
                    keep("test", name, budget, seed, fixed.rows)
                    keep("test", f"matched {name}", budget, seed, matched_random(fixed, pool.plain, seed=seed).rows)
    pq.write_table(pa.Table.from_pylist(chosen), options.work / "selections.parquet", compression="zstd")
    about = {
        "model": f"{model.num_parameters() / 1e6:.1f} M parameters", "device": store.manifest.cost[-1]["device"],
        "costs": {name: costs[method.cost] for name, method in known.items()}, "weights": weights,
        "versions": store.manifest.versions,
    }  # fmt: skip
    (options.work / "scores.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(chosen)} selections; training-step equivalents per sample: {costs}")
    return 0


def selections(options: argparse.Namespace, pool: str) -> dict[tuple[str, str, int], list[int]]:
    """Rows of every selection of a pool, by method, budget and seed."""
    path = options.work / "selections.parquet"
    if not path.exists():
        raise SystemExit(f"there is no {path}: run the stage `score` first")
    table = pq.read_table(path, filters=[("pool", "==", pool)]).to_pylist()
    return {(row["method"], row["budget"], row["seed"]): row["rows"] for row in table}


def settings(options: argparse.Namespace) -> Run:
    """What all trainings have in common; with other settings they are other runs."""
    return {"epochs": options.epochs, "tokens_per_step": options.tokens_per_step}


def tuning_runs(options: argparse.Namespace) -> list[Run]:
    """Trainings on random selections of the development pool."""
    return [
        {"learning_rate": rate, "seed": seed, **settings(options)} for seed in TUNING_SEEDS for rate in LEARNING_RATES
    ]


def test_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Trainings on selections of the test pool, the most important first, each over all seeds before the next begins."""
    from methods import FIRST

    common = {"learning_rate": best_learning_rate(options), **settings(options)}
    known = list(dict.fromkeys(method for method, _, _ in selections(options, "test")))
    wanted = [name for name in known if not options.methods or name.removeprefix("matched ") in options.methods]
    first = [name for name in wanted if name.removeprefix("matched ") in FIRST]
    rest = [name for name in wanted if name not in first]
    yield {"method": NOTHING, "budget": "", "seed": 0, **common}
    for group in (first, rest):
        group.sort(key=lambda name: name.startswith("matched "))
        for budget in options.budgets:
            for name in group:
                yield from ({"method": name, "budget": budget, "seed": seed, **common} for seed in options.seeds)


def tune(options: argparse.Namespace) -> int:
    """Find the learning rate that is best for a random selection of the development pool."""
    if options.workers:
        return launch(options)
    chosen = selections(options, "development")
    bench, examination = prepared(options, "development")

    def do(run: Run) -> dict[str, Any]:
        rows = chosen["random", BUDGETS[0], run["seed"]]
        model, facts = bench.train(rows, run["learning_rate"], run["seed"])
        return facts | examination(model)

    workers.work(options.work, "tune", tuning_runs(options), do, options.shard, options.started + options.seconds)
    return 0


def best_learning_rate(options: argparse.Namespace) -> float:
    """The rate with the lowest mean held-out loss over the tuning seeds."""
    wanted = {workers.key_of(run) for run in tuning_runs(options)}
    results = [one for one in workers.finished(options.work, "tune") if workers.key_of(one["run"]) in wanted]
    if len(results) < len(wanted):
        raise SystemExit(f"{len(results)} of {len(wanted)} tuning runs are finished: run the stage `tune` first")
    losses = {
        rate: float(np.mean([macro(one["loss"]) for one in results if one["run"]["learning_rate"] == rate]))
        for rate in LEARNING_RATES
    }
    return min(losses, key=losses.__getitem__)


def macro(losses: dict[str, float]) -> float:
    """Mean over sources."""
    return float(np.mean(list(losses.values())))


def train(options: argparse.Namespace) -> int:
    """Train on selections of the test pool."""
    if options.workers:
        return launch(options)
    chosen, runs = selections(options, "test"), list(test_runs(options))
    bench, examination = prepared(options, "test")

    def do(run: Run) -> dict[str, Any]:
        if run["method"] == NOTHING:
            return examination(bench.base)
        rows = chosen[run["method"], run["budget"], run["seed"]]
        model, facts = bench.train(rows, run["learning_rate"], run["seed"])
        return facts | examination(model)

    workers.work(options.work, "train", runs, do, options.shard, options.started + options.seconds)
    return 0


def launch(options: argparse.Namespace) -> int:
    """Share a stage's trainings among processes."""
    arguments = [
        options.stage, "--model", options.model, "--work", str(options.work),
        "--epochs", str(options.epochs), "--tokens-per-step", str(options.tokens_per_step),
        "--seeds", *map(str, options.seeds), "--budgets", *options.budgets,
        *(["--methods", *options.methods] if options.methods else []),
    ]  # fmt: skip
    failed = workers.launch(
        Path(__file__), arguments, options.work / "logs", options.workers, options.gpus, options.seconds
    )
    print(f"{len(workers.finished(options.work, options.stage))} runs of `{options.stage}` are finished")
    return 1 if failed else 0


def prepared(options: argparse.Namespace, pool: str) -> tuple[Any, Any]:
    """What trains on a pool, and what examines the models."""
    from training import Bench, Examination, Settings

    bench = Bench(options.model, part(options, pool), Settings(**settings(options)))
    return bench, Examination(bench.tokenizer, part(options, f"{pool}_evaluation"), part(options, "questions"))


def table(options: argparse.Namespace) -> int:
    """Write what was found."""
    from verdict import report

    about = json.loads((options.work / "scores.json").read_text())
    about |= {"learning_rate": best_learning_rate(options), **settings(options)}
    wanted = {workers.key_of(run) for run in test_runs(options)}
    runs = [one for one in workers.finished(options.work, "train") if workers.key_of(one["run"]) in wanted]
    stem = options.results / f"evidence_selection{options.suffix}_{time.strftime('%Y-%m-%d')}"
    report(stem, about, part(options, "test"), selections(options, "test"), runs, part(options, "questions"))
    return 0


STAGES = {"pool": make_pools, "score": make_scores, "tune": tune, "train": train, "table": table}


if __name__ == "__main__":
    raise SystemExit(main())
