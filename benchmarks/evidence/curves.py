"""Table of what the trainings of `grpo.py` found."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from paired import interval
from verdict import shown

from selector.runtime import versions

PLAIN = "uniform"
"""The sampler that the others are held against."""
DECIMALS = {"steps": 1, "area": 4, "last": 4}


def report(stem: Path, results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """Write the results as JSON and as a table to read.

    Args:
        stem: of the two files.
        results: finished trainings, with the curve of held-out rewards and the share of each kind of prompt drawn.
        kinds: of prompts.
    """
    curves: dict[str, dict[int, Array]] = {}
    drawn: dict[str, list[Mapping[str, float]]] = {}
    for one in results:
        curves.setdefault(one["run"]["sampler"], {})[one["run"]["seed"]] = np.array(one["curve"])
        drawn.setdefault(one["run"]["sampler"], []).append(one["drawn"])
    if PLAIN not in curves:
        raise SystemExit(f"no training under {PLAIN} draws is finished: run the stage `train` first")
    run = results[0]["run"]
    mean = np.mean(list(curves[PLAIN].values()), axis=0)
    goal = float(mean[0] + mean[-1]) / 2
    found = {sampler: measures(own, goal, run["every"]) for sampler, own in curves.items()}
    lines = [
        f"# Which prompts should GRPO draw? {time.strftime('%Y-%m-%d')}", "",
        f"{results[0]['device']}; {run['prompts']} prompts, {run['steps']} steps of {run['batch']} prompts with {run['generations']} "
        f"completions each, learning rate {run['learning_rate']:g}. The held-out reward is {mean[0]:.3f} before training. Steps: "
        f"until it is {goal:.3f}, half of its rise under {PLAIN} draws; a run that does not get there counts "
        f"{run['steps'] + run['every']}. Area: its mean over the steps. Differences to {PLAIN} draws are paired by seed, with 95 % "
        "t-intervals over seeds (order, draws and completions) of one warm model and one set of prompts.", "",
        f"| sampler | steps | − {PLAIN} | area | − {PLAIN} | last | − {PLAIN} | reached | "
        + " | ".join(f"drawn: {kind}" for kind in kinds) + " | seeds |",
        "|" + "---|" * (9 + len(kinds)),
    ]  # fmt: skip
    for sampler, own in found.items():
        cells = []
        for name, values in own.items():
            pairs = [value - found[PLAIN][name][seed] for seed, value in values.items() if seed in found[PLAIN][name]]
            cells.append(f"{np.mean(list(values.values())):.{DECIMALS[name]}f}")
            cells.append(shown(interval(pairs)) if pairs and sampler != PLAIN else "")
        reached = np.mean([curve.max() >= goal for curve in curves[sampler].values()])
        shares = [f"{np.mean([one[kind] for one in drawn[sampler]]):.0%}" for kind in kinds]
        lines.append("| " + " | ".join([sampler, *cells, f"{reached:.0%}", *shares, str(len(curves[sampler]))]) + " |")
    lines += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items())]
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(
        json.dumps({"goal": goal, "samplers": found, "runs": list(results)}, indent=1) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))
    print(f"written to {stem}.md and .json")


def measures(curves: Mapping[int, Array], goal: float, every: int) -> dict[str, dict[int, float]]:
    """Steps to a goal, area and last reward, by name and seed.

    Args:
        curves: held-out rewards by seed, before training and every so many steps.
        goal: reward to be reached.
        every: steps between two of them.
    """
    return {
        "steps": {seed: float(steps_to(curve, goal, every)) for seed, curve in curves.items()},
        "area": {seed: float(curve.mean()) for seed, curve in curves.items()},
        "last": {seed: float(curve[-1]) for seed, curve in curves.items()},
    }


def steps_to(curve: Array, goal: float, every: int) -> int:
    """Steps until a curve reaches a goal; those of one look more than it has where it does not."""
    reached = np.flatnonzero(curve >= goal)
    return int(reached[0] if len(reached) else len(curve)) * every
