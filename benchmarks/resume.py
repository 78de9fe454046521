"""Whether an interrupted training draws what it would have drawn: every way to interrupt one, attached and on stock TRL.

    python benchmarks/resume.py                  the whole grid, about 30 minutes on 2 cores
    python benchmarks/resume.py --minutes 9      as much as fits; the next call goes on, and the last one writes the table

Real trainers on a tiny model: {SFT, DPO, GRPO, RLOO} x {1, 2 ranks} x {epoch 0, 1} x {middle, edge} x {0, 2 workers} x {static,
adaptive}, where weights follow the backward pass or refreshed scores (SFT, DPO) or the rewards (GRPO, RLOO). A run counts when the
samples of every step after the checkpoint are those of the uninterrupted run, on every rank. Prints the table and writes it
to benchmarks/results/resume-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import conftest  # noqa: E402, F401  # maps selector.integrations to its folder when the package is not installed
import trainer_cases as cases  # noqa: E402

from selector.errors import IntegrationError  # noqa: E402
from selector.integrations.trl import attach  # noqa: E402

UNFINISHED = HERE / "results" / "resume-unfinished.json"
CASES_AT_ONCE = 8
"""Of two ranks, whose start takes longer than a case."""


def everything() -> dict[str, dict[str, Any]]:
    """All cases by ranks, sampler and name."""
    found = {}
    for world in (1, 2):
        grid = cases.grid(world)
        stock = {name: case | {"attached": False} for name, case in grid.items() if "adaptive" not in name}
        for how, chosen in (("attached", grid), ("stock", stock)):
            found |= {f"{world}|{how}|{name}": case for name, case in chosen.items()}
    return found


def run(names: list[str], left: dict[str, dict[str, Any]], folder: Path) -> dict[str, bool]:
    """Whether each of these cases, which share their number of ranks, resumes exactly."""
    chosen = {name: left[name] for name in names}
    if names[0].startswith("2|"):
        ranks = cases.run_on_two_ranks(chosen, folder)
    else:
        ranks = [{name: cases.resume(out=folder / str(i), **case) for i, (name, case) in enumerate(chosen.items())}]
    return {name: all(cases.same_tail(rank[name]) for rank in ranks) for name in names}


def refused(kind: str, folder: Path) -> bool:
    """Whether weights that follow rewards are refused beside workers, which fetch long before the rewards."""
    trainer = cases.trainer(kind, folder, cases.dataset(30, kind), dataloader_num_workers=2)
    try:
        attach(trainer, cases.selection(cases.TRAINED_IDS), online="rewards")
    except IntegrationError as error:
        return "dataloader_num_workers=2" in str(error)
    return False


def table(same: dict[str, bool], refusals: dict[str, bool]) -> str:
    """One row for each kind of interruption, its workers together."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for key, exact in same.items():
        world, how, name = key.split("|")
        row = ", ".join(part for part in name.split(", ") if "workers" not in part)
        counts[world, row].update({f"{how} exact": int(exact), f"{how} runs": 1})
    lines = [
        "| resumed runs that draw the same samples | attached | the trainer's own sampler |",
        "| --- | --- | --- |",
    ]
    for (world, row), count in sorted(counts.items()):
        mine, theirs = (f"{count[f'{how} exact']} of {count[f'{how} runs']}" for how in ("attached", "stock"))
        lines.append(
            f"| {world} rank{'s' if world == '2' else ''}: {row} | {mine} | {theirs if count['stock runs'] else '-'} |"
        )
    for how in ("attached", "stock"):
        exact = [value for key, value in same.items() if f"|{how}|" in key]
        lines.append(f"| all, {how} | {sum(exact)} of {len(exact)} | |")
    lines += [
        f"| {kind}, adaptive, 2 workers | {'refused' if ok else 'NOT REFUSED'} | |" for kind, ok in refusals.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so long, and go on in the next call"
    )
    deadline = time.monotonic() + 60 * parser.parse_args().minutes
    warnings.simplefilter("ignore")
    packages = ("torch", "transformers", "trl", "accelerate", "numpy", "gradient-selector")
    state: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in packages}, "begun": str(datetime.date.today()),
        "same": {},
    }  # fmt: skip
    if UNFINISHED.exists():
        earlier = json.loads(UNFINISHED.read_text())
        if earlier["versions"] != state["versions"]:
            sys.exit(f"{UNFINISHED} was begun with {earlier['versions']}; remove it to begin again")
        state = earlier
    left = {name: case for name, case in everything().items() if name not in state["same"]}
    with tempfile.TemporaryDirectory() as folder:
        while left and time.monotonic() < deadline:
            world = next(iter(left))[0]
            names = [name for name in left if name[0] == world][: CASES_AT_ONCE if world == "2" else 1]
            out = Path(folder) / str(len(left))
            out.mkdir()
            state["same"] |= run(names, left, out)
            left = {name: case for name, case in left.items() if name not in names}
            UNFINISHED.write_text(json.dumps(state))
            print(*(f"{len(left)} left: {name}: {state['same'][name]}" for name in names), sep="\n", flush=True)
        if left:
            print(f"{len(left)} cases are left; call again")
            return
        refusals = {kind: refused(kind, Path(folder) / kind) for kind in ("grpo", "rloo")}
    today = datetime.date.today()
    begun = "" if state["begun"] == str(today) else f" (begun {state['begun']})"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    report = f"# Resume\n\n{today}{begun}, {machine}, {versions}\n\n{table(state['same'], refusals)}\n"
    print(report)
    (HERE / "results" / f"resume-{today}.md").write_text(report)
    UNFINISHED.unlink()


if __name__ == "__main__":
    main()
