"""A small run of the benchmark of spectra, and its committed results against its thresholds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from selector import spectra

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def quickest(work, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def test_factors_beat_the_dense_svd_on_cpu():
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(1, 64, 768, generator=generator), torch.randn(1, 64, 768, generator=generator)
    dense = quickest(lambda: torch.linalg.svdvals(delta[0].T @ x[0]))
    for precision, factor in (("fast", 8), ("high", 4)):
        assert quickest(lambda p=precision: spectra.singular_values(x, delta, p), 5) * factor < dense


def test_committed_results_are_the_reached_values():
    thresholds = json.loads((BENCHMARKS / "thresholds.json").read_text())
    rows = {}
    for path in sorted(
        (BENCHMARKS / "results").glob("spectra_NVIDIA-*.json"), key=lambda path: path.stem.rsplit("_")[-1]
    ):
        rows |= json.loads(path.read_text())["rows"]  # the newest of each row
    for name, threshold in thresholds.items():
        if "wanted_at_most" in threshold:
            assert rows[name]["value"] <= 1.1 * threshold["reached"], name
        else:
            assert rows[name]["value"] >= 0.9 * threshold["reached"], name
