"""Table and plain words for what the trainings of `selection.py` found."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paired import Interval, interval

from selector.runtime import versions

KINDS = ("shuffled", "truncated", "off_topic", "near_duplicate")
CHEAP = 1.5
"""Training-step equivalents per sample that a default may cost."""
Results = dict[tuple[str, str], dict[int, Mapping[str, Any]]]
"""By method and budget, and then by seed."""


def report(
    stem: Path,
    about: Mapping[str, Any],
    pool: Sequence[Mapping[str, Any]],
    selections: Mapping[tuple[str, str, int], Sequence[int]],
    runs: Sequence[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
) -> None:
    """Write the results as JSON and as tables to read.

    Args:
        stem: of the two files.
        about: model, device, costs and settings.
        pool: rows of the test pool.
        selections: rows by method, budget and seed.
        runs: finished trainings.
        questions: of the choice tasks.
    """
    results: Results = {}
    for one in runs:
        results.setdefault((one["run"]["method"], one["run"]["budget"]), {})[one["run"]["seed"]] = one
    budgets = [budget for budget in dict.fromkeys(budget for _, budget in results) if budget]
    if not budgets:
        raise SystemExit("no training is finished: run the stage `train` first")
    noise = np.array([row["noise"] for row in pool])
    tables = {budget: compare(results, budget, about["costs"], noise, selections) for budget in budgets}
    stem.parent.mkdir(parents=True, exist_ok=True)
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "rates": rates(noise)} | dict(
        about
    )
    facts["versions"] = versions() | dict(about["versions"])
    lines = [
        f"# Does a selection train a better model? {facts['date']}", "",
        f"{about['model']}, {about['device']}; learning rate {about['learning_rate']:g}, {about['epochs']} epochs, steps of about "
        f"{about['tokens_per_step']} tokens; {len(pool)} rows of {len({row['source'] for row in pool})} sources, of which "
        + ", ".join(f"{share:.0%} {kind}" for kind, share in facts["rates"].items()) + ".", "",
        "Loss is the mean over sources of the held-out loss on clean rows, nats/token; lower is better. Differences are paired by "
        "training seed, with 95 % t-intervals; a negative one says that the method trains the better model. *Matched* is random "
        "with the length profile of the same selection. The intervals are of seeds (order of the rows, and what is drawn at random) "
        "on one pool and one model; they say nothing of other pools. Noise is the share of the picked rows. Cost is what "
        "measuring one sample takes, in training steps on it. A name tells the direction of the measure; scores are controlled for "
        "length unless raw.", "",
    ]  # fmt: skip
    for budget, rows in tables.items():
        lines += ["", f"## {budget}", "", *verdict(rows), "", *markdown(rows)]
    lines += [
        "",
        "## Choice tasks",
        "",
        *choices(results, questions, ["nothing", "random", *(rows[0]["method"] for rows in tables.values())]),
    ]
    lines += ["", "## Weights of the combination (z-scores, fitted on the development pool)", ""]
    lines += [f"- {name}: {weight:+.3f}" for name, weight in about["weights"]["combination"].items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"about": facts, "tables": tables, "runs": list(runs)}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1, default=vars) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"written to {stem}.md and .json")


def rates(noise: np.ndarray) -> dict[str, float]:
    """Share of each kind of noise among rows."""
    return {kind: float((noise == kind).mean()) for kind in KINDS}


def compare(
    results: Results,
    budget: str,
    costs: Mapping[str, float],
    noise: np.ndarray,
    selections: Mapping[tuple[str, str, int], Sequence[int]],
) -> list[dict[str, Any]]:
    """One budget's methods against random ones, the best first.

    Args:
        results: finished trainings.
        budget: which.
        costs: training-step equivalents per sample, by method.
        noise: [N] str, kind of noise of each row of the pool.
        selections: rows by method, budget and seed.
    """
    rows = []
    for (name, own), seeds in results.items():
        if own != budget or name.startswith("matched "):
            continue
        picked = np.concatenate([selections[name, budget, seed] for seed in seeds]).astype(int)
        rows.append(
            {
                "method": name, "loss": interval([loss_of(one) for one in seeds.values()]),
                "to_random": None if name == "random" else difference(seeds, results.get(("random", budget), {})),
                "to_matched": difference(seeds, results.get((f"matched {name}", budget), {})),
                "noise": rates(noise[picked]), "cost": costs[name], "rows": len(picked) / len(seeds),
                "steps": float(np.mean([one["steps"] for one in seeds.values()])),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: row["to_random"].mean if row["to_random"] else 0.0)


def loss_of(result: Mapping[str, Any]) -> float:
    """Mean over sources of the held-out loss."""
    return float(np.mean(list(result["loss"].values())))


def difference(own: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> Interval | None:
    """Loss of one method less that of another, paired by seed; None where no seed has both."""
    seeds = sorted(own.keys() & other.keys())
    return interval([loss_of(own[seed]) - loss_of(other[seed]) for seed in seeds]) if seeds else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table."""
    lines = [
        "| method | loss | − random | − matched | " + " | ".join(KINDS) + " | rows | steps | cost | seeds |",
        "|---|---|---|---|" + "---|" * (len(KINDS) + 4),
    ]
    for row in rows:
        noise = " | ".join(f"{row['noise'][kind]:.0%}" for kind in KINDS)
        lines.append(
            f"| {row['method']} | {row['loss'].mean:.4f} | {shown(row['to_random'])} | {shown(row['to_matched'])} | {noise} "
            f"| {row['rows']:.0f} | {row['steps']:.0f} | {row['cost']:.2f} | {row['loss'].n} |"
        )
    return lines


def shown(found: Interval | None) -> str:
    """A difference with its interval, bold where it excludes zero."""
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:+.4f}"
    text = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    return f"**{text}**" if found.excludes_zero else text


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in words."""
    said = []
    for key, rival in (("to_random", "random"), ("to_matched", "length-matched random")):
        against = [row for row in rows if row[key] is not None and row[key].n > 1 and row["method"] != "random"]
        better = [row["method"] for row in against if row[key].excludes_zero and row[key].mean < 0]
        worse = [row["method"] for row in against if row[key].excludes_zero and row[key].mean > 0]
        if against:
            said.append(
                f"Against {rival}, of {len(against)} methods {len(better)} train a better model ({', '.join(better) or 'none'}) and "
                f"{len(worse)} a worse one ({', '.join(worse) or 'none'}); chance alone would give each about "
                f"{0.025 * len(against):.1f}."
            )
    both = [
        row
        for row in rows
        if all(row[key] and row[key].excludes_zero and row[key].mean < 0 for key in ("to_random", "to_matched"))
    ]
    cheap = [row["method"] for row in both if row["cost"] <= CHEAP]
    said.append(
        f"Better than both, at no more than {CHEAP} training steps per sample: {', '.join(cheap)}."
        if cheap
        else f"No method is better than both at no more than {CHEAP} training steps per sample."
    )
    return said


def choices(results: Results, questions: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """Lines of a table of accuracies against chance.

    Args:
        results: finished trainings.
        questions: of the choice tasks.
        methods: whose models are shown.
    """
    lines = ["| task | questions | chance ± 2 standard errors | trained on | accuracy |", "|---|---|---|---|---|"]
    for task in dict.fromkeys(question["task"] for question in questions):
        own = [1 / len(question["choices"]) for question in questions if question["task"] == task]
        chance = float(np.mean(own))
        error = 2 * float(np.sqrt(np.sum([p * (1 - p) for p in own]))) / len(own)
        for (name, budget), seeds in results.items():
            if name not in methods:
                continue
            reached = float(np.mean([one["accuracy"][task] for one in seeds.values()]))
            beyond = " (beyond chance)" if reached > chance + error else ""
            lines.append(
                f"| {task} | {len(own)} | {chance:.3f} ± {error:.3f} | {name} {budget} | {reached:.3f}{beyond} |"
            )
    return lines
