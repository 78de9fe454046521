"""What a run costs: the ledger entry that it leaves in the manifest, and the estimate of a dry run.

The unit of comparison is an epoch of training on the same samples, reckoned as three forward passes of them (backward is
two), without the optimizer: a measured forward time, times three.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from selector.batching import token_budget_batches
from selector.data.samples import Sample
from selector.scorer.clocks import BACKWARD, FACTORS, FORWARD, SCORES, SPECTRA, WRITING, Clocks
from selector.scorer.features import FeatureExtractor
from selector.scorer.measure import Collate, padded_tokens
from selector.types import MEASURES

FORWARDS_PER_TRAINING_STEP = 3
PROBES = 6
"""Batches that a dry run measures, spread evenly from the longest samples to the shortest."""
COMPRESSED = 0.85
"""Share of their size that float32 features take in a shard."""
BYTES_BESIDE_FEATURES = 100


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a dry run expects of the whole run."""

    samples: int
    """Samples still to be measured."""
    tokens: int
    """Their tokens."""
    tokens_per_batch: int
    """Budget of a batch."""
    seconds: float
    """Time to measure them with all processes."""
    epoch_ratio: float
    """Cost relative to one epoch of training on them."""
    peak_memory: int | None
    """Most bytes that a device held during the probes; None on a CPU."""
    store_bytes: int
    """Size of the finished store."""


def estimate(
    extract: FeatureExtractor,
    samples: Sequence[Sample],
    tokens_per_batch: int,
    collate: Collate,
    device: torch.device,
    state: PartialState,
) -> Estimate:
    """Measure a few batches of different lengths and reckon the rest from them; nothing is written.

    Args:
        extract: attached to the model.
        samples: all of status `ok` that are still to be measured, one or more.
        tokens_per_batch: budget of a batch.
        collate: makes a batch of samples on the model's device.
        device: where the model is.
        state: place of this process.
    """
    batches = token_budget_batches(samples, tokens_per_batch)
    chosen = sorted({round(i) for i in np.linspace(0, len(batches) - 1, PROBES)})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    extract(collate(batches[chosen[-1]]))  # the first pass of a process is slow
    extract.clocks.clear()
    seconds = []
    for i in chosen:
        started = time.perf_counter()
        extract(collate(batches[i]))
        seconds.append(time.perf_counter() - started)
    per_token = [spent / padded_tokens(batches[i]) for i, spent in zip(chosen, seconds, strict=True)]
    sizes = np.array([padded_tokens(batch) for batch in batches])
    whole = float(np.interp(np.arange(len(batches)), chosen, per_token) @ sizes) / state.num_processes
    numbers = len(MEASURES) * len(extract.targets) + len(extract.scores.scorers)
    bytes_per_sample = BYTES_BESIDE_FEATURES + COMPRESSED * 4 * numbers
    if extract.sketch is not None:
        bytes_per_sample += (2 * extract.sketch.dimension + 4) * len(extract.targets)
    return Estimate(
        samples=len(samples), tokens=sum(sample.n_tokens for sample in samples), tokens_per_batch=tokens_per_batch,
        seconds=whole, epoch_ratio=sum(seconds) / (FORWARDS_PER_TRAINING_STEP * max(extract.clocks.seconds(FORWARD), 1e-9)),
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        store_bytes=int(bytes_per_sample * len(samples)),
    )  # fmt: skip


def phases(clocks: Clocks, preparing: float, measuring: float, waiting: float) -> dict[str, float]:
    """Seconds of one process by what they went to; `preparing` comes before the measurement, the others make it up.

    Args:
        clocks: of the measurement.
        preparing: reading, tokenizing and checking.
        measuring: what fell to this process, from the start to its last row.
        waiting: from then until the last process was done.
    """
    factors = clocks.seconds(FACTORS)
    counted = {
        "model": clocks.seconds(FORWARD) + clocks.seconds(BACKWARD) - factors,
        "factors": factors,
        "spectra": clocks.seconds(SPECTRA),
        "scores": clocks.seconds(SCORES),
        "writing": clocks.seconds(WRITING),
    }
    other = {"other": measuring - sum(counted.values()), "waiting": waiting}
    return {name: round(seconds, 3) for name, seconds in ({"preparing": preparing} | counted | other).items()}


def ledger_entry(
    samples: Sequence[Sample],
    seconds: float,
    forward_seconds: float,
    by_process: Sequence[Mapping[str, float]],
    tokens_per_batch: int,
    store_bytes: int,
) -> dict[str, Any]:
    """What a run leaves in the manifest.

    Args:
        samples: that all processes have measured.
        seconds: wall-clock time of the measurement.
        forward_seconds: that the main process spent in forward passes.
        by_process: of each process what `phases` returned.
        tokens_per_batch: budget at the end.
        store_bytes: of all shards that the main process can see.
    """
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": len(samples),
        "tokens": sum(sample.n_tokens for sample in samples),
        "seconds": round(seconds, 3),
        "device_seconds": round(seconds * len(by_process), 3),
        "epoch_ratio": round(seconds / (FORWARDS_PER_TRAINING_STEP * forward_seconds), 3) if forward_seconds else None,
        "phases": {name: [process[name] for process in by_process] for name in by_process[0]},
        "store_bytes": store_bytes,
        "tokens_per_batch": tokens_per_batch,
        "processes": len(by_process),
        "device": device_name(),
    }


def device_name() -> str:
    """Name of the accelerator, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
