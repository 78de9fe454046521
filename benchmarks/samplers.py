"""What the samplers cost: the order of ten million samples, and drawing beside a training step.

    python benchmarks/samplers.py

Prints a table and writes it to benchmarks/results/samplers-DATE.md. Whether an interrupted run draws what it would have
drawn is measured by `benchmarks/resume.py`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import conftest  # noqa: E402, F401  # maps selector.integrations to its folder when the package is not installed
import trainer_cases as cases  # noqa: E402

from selector.assets import TINY_MODEL  # noqa: E402
from selector.integrations.trl import attach  # noqa: E402
from selector.sampling import AdaptiveSampler, RewardSignal, SelectionSampler, weighted_order  # noqa: E402

Row = tuple[str, str, str]


def order_of_ten_million() -> list[Row]:
    """Time and memory of one weighted order."""
    n = 10_000_000
    rng = np.random.default_rng(0)
    keys, weights = rng.integers(0, 2**63, n, dtype=np.uint64), rng.exponential(size=n)
    seconds, busy = [], []
    for epoch in range(5):
        began, cpu = time.perf_counter(), time.process_time()
        weighted_order(keys, weights, seed=0, epoch=epoch)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - cpu)
    tracemalloc.start()
    weighted_order(keys, weights, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [
        (
            "order of 10 M samples, weighted, without replacement: median of 5",
            f"{np.median(seconds):.2f} s, {np.median(busy):.2f} s of one core",
            "<= 1.5 s",
        ),
        ("... peak of memory that it allocates", f"{peak / 1e6:.0f} MB", "<= 250 MB"),
    ]


def overhead_of_a_step(folder: Path) -> list[Row]:
    """What drawing costs beside a training step of the embedded model, the cheapest real one there is."""
    from transformers import AutoModelForCausalLM

    n, batch = 100_000, 8
    picked = cases.selection([f"s{i}" for i in range(n)])
    began = time.perf_counter()
    drawn = sum(1 for _ in SelectionSampler(picked, batch_size=batch))
    static = (time.perf_counter() - began) / drawn * batch
    signal = RewardSignal()
    sampler = AdaptiveSampler(picked, signal, batch_size=batch)
    draws = iter(sampler)
    next(draws)
    began = time.perf_counter()
    for _ in range(100):
        for _ in range(batch):
            next(draws)
    adaptive = (time.perf_counter() - began) / 100
    network = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    options = {"per_device_train_batch_size": batch, "num_train_epochs": 1}
    trainer = cases.trainer("sft", folder, cases.dataset(400, "sft"), network, **options)
    attach(trainer, cases.selection([f"s{i}" for i in range(400)]))
    step = trainer.train().metrics["train_runtime"] / 50
    return [
        (f"training step of the embedded model, {batch} short samples", f"{1e3 * step:.1f} ms", ""),
        (
            "drawing a batch from 100,000 samples, static",
            f"{1e6 * static:.1f} us = {static / step:.2%} of it",
            "< 0.5 %",
        ),
        ("... adaptive, O(pool) a batch", f"{1e3 * adaptive:.2f} ms = {adaptive / step:.2%} of it", ""),
    ]


def table(rows: list[Row], head: Row) -> str:
    """Rows as Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ("---", "---", "---"), *rows])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl", "accelerate", "numpy")
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        costs = order_of_ten_million() + overhead_of_a_step(out)
        write("samplers", versions, table(costs, ("what", "measured", "goal")))


def write(name: str, versions: str, rows: str) -> None:
    """Print a table and keep it with its circumstances."""
    today = datetime.date.today()
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    report = f"# {name.capitalize()}\n\n{today}, {machine}, {versions}\n\n{rows}\n"
    print(report)
    (HERE / "results" / f"{name}-{today}.md").write_text(report)


if __name__ == "__main__":
    main()
