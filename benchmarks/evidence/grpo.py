"""Which prompts should reinforcement learning draw? GRPO on questions that a small model can learn, under five samplers.

    python benchmarks/evidence/grpo.py warm
    python benchmarks/evidence/grpo.py tune  --workers 8 --gpus 2
    python benchmarks/evidence/grpo.py train --workers 8 --gpus 2 --seconds 140
    python benchmarks/evidence/grpo.py table

The prompts ask for the largest of three numbers, the second of four, the middle one of five, and, as hopeless ones, products of
four digits, a quarter each; the reward is an exact match. `warm` fine-tunes the model on a few other questions until it
answers about a quarter of the easiest ones, and scores the prompts with that model. All samplers start there, with the
learning rate that `tune` finds best for uniform draws under other seeds; what differs is the prompts they draw. The held-out
reward is the mean probability of the right answer to questions that no training sees, hopeless ones left out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import workers

SEEDS = (0, 1, 2, 3, 4)
KINDS = {"largest": (3, -1), "second": (4, -2), "middle": (5, 2), "hopeless": (0, 0)}
"""How many numbers a question of each kind names, and the place of the answer among them in ascending order."""
SEARCHES = ("largest", "second", "middle")
EASY = "largest"
WARM_AT = 0.25
"""Probability of the right answer to the easiest questions from which on the model is warm."""
WARM_RATE = 1e-3
"""Learning rate of the demonstrations."""
GROWTH = 1.5
"""Factor on the number of demonstrations until it is."""
MOST = 100
"""Times as many demonstrations as at first after which warming gives up."""
TUNING_SEEDS = (100, 101, 102)
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
SAMPLERS = ("uniform", "learnability", "angles", "spectral", "mixed")

Run = dict[str, Any]
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--model", default="embedded", help="checkpoint of a causal language model, or `embedded`")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/grpo"), help="where everything is kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "results", help="for `table`")
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--demonstrations", type=int, default=200, help="with which warming begins")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=3, help="steps between two looks at the held-out reward")
    parser.add_argument("--batch", type=int, default=32, help="prompts of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--workers", type=int, help="processes on each GPU, or in all without one")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--shard", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--seconds", type=float, default=540, help="that `train` may take")
    options = parser.parse_args(arguments)
    options.started = time.monotonic()
    if options.model == "embedded":
        from selector.assets import TINY_MODEL

        options.model = str(TINY_MODEL)
    return STAGES[options.stage](options)


def problems(kind: str, count: int, rng: np.random.Generator, taken: set[str]) -> list[Row]:
    """Problems of a kind as prompt and completion.

    Args:
        kind: one of `KINDS`.
        count: how many.
        rng: draws them.
        taken: prompts that must not come.
    """
    found: list[Row] = []
    while len(found) < count:
        if kind == "hopeless":
            a, b = rng.integers(1000, 10000, 2).tolist()
            prompt, right = f"product of {a}, {b} =", a * b
        else:
            count_of, place = KINDS[kind]
            numbers = rng.choice(100, count_of, replace=False).tolist()
            prompt, right = f"{kind} of {', '.join(map(str, numbers))} =", sorted(numbers)[place]
        if prompt not in taken:
            found.append({"id": prompt, "source": kind, "prompt": prompt, "completion": f" {right}"})
    return found


def parts(prompts: int) -> dict[str, list[Row]]:
    """Prompts to train on and held-out ones, each prompt once.

    Args:
        prompts: how many to train on; half as many are held out.
    """
    rng = np.random.default_rng(0)
    found: dict[str, list[Row]] = {"heldout": [], "pool": []}
    taken: set[str] = set()
    for part, kinds, count in (("heldout", SEARCHES, prompts // 6), ("pool", tuple(KINDS), prompts // len(KINDS))):
        for kind in kinds:
            for _ in range(count):
                found[part] += problems(kind, 1, rng, taken)
                taken.add(found[part][-1]["prompt"])
    return found


def warm(options: argparse.Namespace) -> int:
    """Teach the model the form of the answers, and score the prompts with it."""
    from datasets import Dataset
    from training import Bench, Settings, encode, log_likelihoods

    from selector.config import ScoreConfig
    from selector.scorer import score_dataset

    found = parts(options.prompts)
    taken = {row["prompt"] for rows in found.values() for row in rows}
    rng, count = np.random.default_rng(1), options.demonstrations
    easy = [row for row in found["heldout"] if row["source"] == EASY]
    while True:
        demonstrations = [row for kind in SEARCHES for row in problems(kind, count // len(SEARCHES), rng, taken)]
        bench = Bench(options.model, demonstrations, Settings(epochs=1, tokens_per_step=512))
        model, _ = bench.train(range(len(demonstrations)), WARM_RATE, 0)
        samples = encode(bench.tokenizer, [(row["prompt"], row["completion"]) for row in easy])
        reached = float(np.exp(log_likelihoods(model, samples)).mean())
        print(
            f"{len(demonstrations)} demonstrations: right answers to the easiest questions with probability {reached:.3f}"
        )
        if reached >= WARM_AT:
            break
        count = int(count * GROWTH)
        if count > MOST * options.demonstrations:
            raise SystemExit("the model does not learn the form of the answers: take a larger one")
    plain = copy.deepcopy(bench.base)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(options.work / "warm")
    bench.tokenizer.save_pretrained(options.work / "warm")
    config = ScoreConfig(id_column="id", scorers=("spectra", "angle_concentration"))
    score_dataset(plain, bench.tokenizer, Dataset.from_list(found["pool"]), options.work / "features", config)
    return 0


def settings(options: argparse.Namespace) -> Run:
    """What all trainings have in common; with other settings they are other runs."""
    return {name: getattr(options, name) for name in ("prompts", "steps", "every", "batch", "generations")}


def tuning_runs(options: argparse.Namespace) -> list[Run]:
    """Uniform draws under several learning rates."""
    common = {"sampler": "uniform", **settings(options)}
    return [{"seed": seed, "learning_rate": rate, **common} for seed in TUNING_SEEDS for rate in LEARNING_RATES]


def runs(options: argparse.Namespace) -> list[Run]:
    """All samplers with one seed after the other, at the best learning rate."""
    results = finished(options, "tune", tuning_runs(options))
    if len(results) < len(tuning_runs(options)):
        raise SystemExit(
            f"{len(results)} of {len(tuning_runs(options))} tuning runs are finished: run the stage `tune` first"
        )
    areas = {
        rate: np.mean([one["curve"] for one in results if one["run"]["learning_rate"] == rate])
        for rate in LEARNING_RATES
    }
    common = {"learning_rate": max(areas, key=areas.__getitem__), **settings(options)}
    return [{"sampler": sampler, "seed": seed, **common} for seed in options.seeds for sampler in options.samplers]


def finished(options: argparse.Namespace, stage: str, wanted: list[Run]) -> list[dict[str, Any]]:
    """Results of those runs that are finished."""
    keys = {workers.key_of(run) for run in wanted}
    return [one for one in workers.finished(options.work, stage) if workers.key_of(one["run"]) in keys]


def tune(options: argparse.Namespace) -> int:
    """Find the learning rate that is best for uniform draws."""
    return launch(options) if options.workers else trainings(options, tuning_runs(options))


def train(options: argparse.Namespace) -> int:
    """Train under every sampler."""
    return launch(options) if options.workers else trainings(options, runs(options))


def trainings(options: argparse.Namespace, wanted: list[Run]) -> int:
    """Do this process's share of some runs."""
    if not (options.work / "features").exists():
        raise SystemExit(f"there is no {options.work / 'features'}: run the stage `warm` first")
    import training

    from selector.scorer import load_model
    from selector.scorer.cost import device_name
    from selector.scores import score
    from selector.selecting import select
    from selector.store import FeatureStore

    device = training.prepare()
    model, tokenizer = load_model(str(options.work / "warm"), "float32", device=device)
    store, found = FeatureStore.open(options.work / "features"), parts(options.prompts)
    selection = select(score(store, "effective_rank"), budget="100%")
    concentration = score(store, "angle_concentration", control="none")
    angles = dict(zip(concentration.ids.tolist(), concentration.raw.tolist(), strict=True))
    heldout = training.encode(tokenizer, [(row["prompt"], row["completion"]) for row in found["heldout"]])

    def do(run: Run) -> dict[str, Any]:
        own = copy.deepcopy(model)
        curve: list[float] = []

        def look() -> None:
            curve.append(float(np.exp(training.log_likelihoods(own, heldout)).mean()))

        look()
        signal = signal_of(run["sampler"], angles)
        drawn = reinforce(own, tokenizer, found["pool"], selection, signal, look, run, options)
        return {"curve": curve, "drawn": drawn, "device": device_name()}

    workers.work(options.work, options.stage, wanted, do, options.shard, options.started + options.seconds)
    return 0


def signal_of(sampler: str, angles: Mapping[str, float]) -> Any:
    """What the weights of a sampler follow; None for equal ones."""
    from selector.sampling import FocusSignal, RewardSignal
    from selector.sampling.spectral import TapSignal

    return {
        "uniform": lambda: None,
        "learnability": lambda: RewardSignal(richness=0.0),
        "angles": lambda: FocusSignal(angles),
        "spectral": lambda: TapSignal(share=None),
        "mixed": lambda: RewardSignal(richness=0.5, angles=angles),
    }[sampler]()


def reinforce(
    model: Any,
    tokenizer: Any,
    pool: list[Row],
    selection: Any,
    signal: Any,
    look: Any,
    run: Run,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Train with GRPO, in place.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        pool: prompts with answers.
        selection: all of them, with scores.
        signal: of the sampler.
        look: is called every so many steps.
        run: seed of draws and completions, and learning rate.
        options: steps, batch and generations.

    Returns:
        Share of the drawn prompts by kind.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    from selector.integrations.trl import attach

    kinds = {row["prompt"]: row["source"] for row in pool}
    rows = [{"id": row["id"], "prompt": row["prompt"], "answer": row["completion"].strip()} for row in pool]
    counts = dict.fromkeys(KINDS, 0)

    def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        for prompt in prompts:
            counts[kinds[prompt]] += 1
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % options.every == 0:
                look()

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch * options.generations,
            num_generations=options.generations, max_completion_length=8, learning_rate=run["learning_rate"], beta=0.0,
            lr_scheduler_type="constant", seed=run["seed"], report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, reward_funcs=reward,
            callbacks=[Look()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        attach(trainer, selection, online=signal, id_column="id")
        trainer.train()
    total = sum(counts.values())
    return {kind: count / total for kind, count in counts.items()}


def launch(options: argparse.Namespace) -> int:
    """Share the trainings among processes."""
    common = {"model": options.model, "work": options.work, **settings(options)}
    arguments = [text for name, value in common.items() for text in (f"--{name}", str(value))]
    arguments += ["--samplers", *options.samplers, "--seeds", *map(str, options.seeds)]
    failed = workers.launch(
        Path(__file__),
        [options.stage, *arguments],
        options.work / "logs",
        options.workers,
        options.gpus,
        options.seconds,
    )
    print(f"{len(workers.finished(options.work, options.stage))} runs of `{options.stage}` are finished")
    return 1 if failed else 0


def table(options: argparse.Namespace) -> int:
    """Write what was found."""
    from curves import report

    results = finished(options, "train", runs(options))
    report(options.results / f"evidence_grpo_{time.strftime('%Y-%m-%d')}", results, tuple(KINDS))
    return 0


STAGES = {"warm": warm, "tune": tune, "train": train, "table": table}


if __name__ == "__main__":
    raise SystemExit(main())
