"""Speed, scaling, memory and invariance of the scorer, on random weights of real shapes and no download.

    python benchmarks/scoring.py                     everything, on 1, 2, 4, ... GPUs of this machine
    python benchmarks/scoring.py speed --shape 1.5b 7b --samples 32000
    ACCELERATE_USE_CPU=true python benchmarks/scoring.py --shape tiny --samples 40 --rows 8 --longest 512 --processes 4

Each number of processes is one launch by torchrun, which runs all parts. Samples are Alpaca-like: unless --data names a file,
prompts and completions have log-normal numbers of tokens (medians 17 and 54, deviations 0.46 and 1.28 of the logarithm, at
most 1,000), as the 21,200 rows of the Alpaca union have, and random tokens.

    speed        samples/s end to end, tokenizing and writing included, once kernels are compiled (which stay on disk; the run
                 before it says how long that takes), and where the time went, read from the store's own ledger; large shapes also
                 under FSDP2
    training     two epochs (forward, backward, AdamW) over the same samples, in the largest batches that fit; the first one meets
                 shapes that libraries have to plan for; one process
    long         one sequence of 32k tokens through the 7B shape with checkpointing, one process
    invariance   features of the same samples across batch sizes, padding, processes and sharding, in float32
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

# Scoring leaves the memory in pieces, of which training needs larger ones.
os.environ.update(HF_HUB_OFFLINE="1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer
from workload import SHAPES, build_data, build_model, free, shard, synchronize, train

from selector import FeatureStore, ScoreConfig, score_dataset
from selector.assets import TINY_MODEL
from selector.batching import join
from selector.data.samples import Sample, TokenSequence
from selector.gradients.targets import find_targets
from selector.runtime import versions
from selector.scorer.features import FeatureExtractor
from selector.scorer.processes import process_state
from selector.types import MEASURES

SHARDED = ("tiny", "7b")
"""Shapes that are also scored under FSDP2."""


def part_speed(arguments: argparse.Namespace, out: Path) -> dict:
    """Score everything, with each shape and way of sharing the model."""
    state = process_state()
    report = {}
    for shape in arguments.shape:
        modes = ("data parallel", "FSDP2") if shape in SHARDED and state.num_processes > 1 else ("data parallel",)
        for mode in modes:
            report[f"{shape}, {mode}"] = speed(shape, mode, arguments, out)
            free()
    return report


def speed(shape: str, mode: str, arguments: argparse.Namespace, out: Path) -> dict:
    """Score everything once."""
    state = process_state()
    device = state.device
    model = build_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    if mode == "FSDP2":
        shard(model, state)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    data = build_data(arguments.samples, arguments.data)
    stem = f"{shape} {mode} {state.num_processes}"
    started = time.perf_counter()
    score_dataset(model, tokenizer, data, out / f"warm {stem}")
    warming = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    state.wait_for_everyone()
    started = time.perf_counter()
    store = score_dataset(model, tokenizer, data, out / f"speed {stem}")
    synchronize(device)
    seconds = time.perf_counter() - started
    entry = store.manifest.cost[-1]
    phases = {name: float(np.mean(spent)) for name, spent in entry["phases"].items()}
    return {
        "processes": state.num_processes, "samples": entry["samples"], "tokens": entry["tokens"], "seconds": seconds,
        "seconds of the run before": warming,
        "seconds measuring": entry["seconds"], "samples/s": entry["samples"] / seconds, "tokens/s": entry["tokens"] / seconds,
        "samples/s measuring": entry["samples"] / entry["seconds"], "seconds by phase": phases,
        "idle share": [spent / entry["seconds"] for spent in entry["phases"]["waiting"]],
        "tokens per batch": entry["tokens_per_batch"], "bytes per sample": entry["store_bytes"] / entry["samples"],
        "ledger's ratio to an epoch": entry["epoch_ratio"],
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip


def part_training(arguments: argparse.Namespace, out: Path) -> dict:
    """Train on everything, with each shape."""
    device = process_state().device
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    report = {}
    for shape in arguments.shape:
        model = build_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        report[shape] = train(model, tokenizer, build_data(arguments.samples, arguments.data), device)
        del model
        free()
    return report


def part_invariance(arguments: argparse.Namespace, out: Path) -> dict:
    """Largest relative difference of any feature, against one process with one sample at a time."""
    state = process_state()
    shape = arguments.shape[0]
    model = build_model(shape, torch.float32, state.device, layers=4 if shape != "tiny" else None)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    data = build_data(arguments.rows, arguments.data)
    variants = {"batch 8": {"tokens_per_batch": 1024}, "batch 32": {"tokens_per_batch": 16_384}}
    if state.num_processes == 1:
        variants = (
            {"batch 1": {"tokens_per_batch": 1}}
            | variants
            | {"padding-free": {"padding_free": True}, "checkpointing": {"checkpoint": True}}
        )
    for name, settings in variants.items():
        score_dataset(model, tokenizer, data, out / f"{name}, {state.num_processes} processes", ScoreConfig(**settings))
    if state.num_processes > 1:
        shard(model, state)
        score_dataset(model, tokenizer, data, out / f"FSDP2, {state.num_processes} processes", ScoreConfig())
    if not state.is_main_process:
        return {}
    reference = FeatureStore.open(out / "batch 1, 1 processes")
    stores = [
        path
        for path in sorted(out.iterdir())
        if path.name.endswith(f"{state.num_processes} processes") and path != reference.path
    ]
    return {path.name: worst_difference(FeatureStore.open(path), reference) for path in stores}


def worst_difference(found: FeatureStore, reference: FeatureStore) -> dict[str, float]:
    """Of each measure, over samples and layers whose gradient is more than rounding of the sample's largest."""
    assert found.ids.tolist() == reference.ids.tolist()
    norms = reference.features("frobenius_norm")
    used = norms > 1e-6 * np.nanmax(norms, axis=1, keepdims=True)
    return {name: float(np.abs(found.features(name) / reference.features(name) - 1)[used].max()) for name in MEASURES}


def part_long(arguments: argparse.Namespace, out: Path) -> dict:
    """One long sequence with checkpointing: time and peak memory; a short one before it warms up."""
    device = process_state().device
    shape = "7b" if arguments.shape != ["tiny"] else "tiny"
    model = build_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    extractor = FeatureExtractor(model, find_targets(model), "auto", checkpoint=True)
    row, seconds = {}, 0.0
    with extractor.attached():
        for length in (arguments.longest // 32, arguments.longest):
            tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, length).astype(np.int32)
            sample = Sample("long", 0, None, (TokenSequence(tokens, np.arange(length) >= length // 2),))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            started = time.perf_counter()
            (row,) = extractor(join([sample], device))
            synchronize(device)
            seconds = time.perf_counter() - started
    return {
        "shape": shape, "tokens": arguments.longest, "status": row["status"], "seconds": seconds,
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "weights GiB": sum(p.nbytes for p in model.parameters()) / 2**30,
    }  # fmt: skip


PARTS = {"speed": part_speed, "training": part_training, "long": part_long, "invariance": part_invariance}
ALONE = ("training", "long")
"""Parts for one process."""


def work(arguments: argparse.Namespace) -> None:
    """One process of a launch: its parts, one after the other, each reported as soon as it is done."""
    state = process_state()
    report = {}
    for part in arguments.parts:
        started = time.perf_counter()
        report[part] = PARTS[part](arguments, arguments.worker)
        free()
        if state.is_main_process:
            done = f"{part}, {state.num_processes} processes, {time.perf_counter() - started:.0f} s"
            print(done, json.dumps(report[part]), flush=True)
            arguments.result.write_text(json.dumps(report))


def launch(parts: list[str], processes: int, out: Path, words: list[str]) -> dict:
    """Run parts in processes of their own and return what the first reports, up to a failure."""
    result = out / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, *parts, "--worker", str(out), "--result", str(result), *words]
    messages = result.with_suffix(".log")
    with messages.open("w") as file:
        done = subprocess.run(command, stderr=file, check=False)
    report = json.loads(result.read_text()) if result.exists() else {}
    if done.returncode:
        report["failed"] = messages.read_text()[-6000:]
        print("failed:", report["failed"], flush=True)
    return report


def table(report: dict) -> str:
    """The results as Markdown."""
    lines = [
        f"# Scoring on {report['device']}", "",
        f"{report['date']}; {report['data']}; " + ", ".join(f"{name} {have}" for name, have in report["versions"].items()),
        "", "Efficiency is samples/s over that of one process times their number, end to end and, in brackets, from the first batch to",
        "the last shard. Shares of the time from the first batch on are of the mean process, idle is that of the slowest and the fastest.",
        "", "| model | processes | samples | samples/s | tokens/s | efficiency | preparing | model | factors | spectra | writing | other | idle |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    speeds = {processes: found["speed"] for processes, found in report["processes"].items() if "speed" in found}
    for processes, found in speeds.items():
        for name, row in found.items():
            alone = speeds.get("1", {}).get(name.split(",")[0] + ", data parallel")
            efficiency = "-"
            if alone:
                whole, measuring = (
                    row[rate] / (int(processes) * alone[rate]) for rate in ("samples/s", "samples/s measuring")
                )
                efficiency = f"{whole:.2f} ({measuring:.2f})"
            by_phase = row["seconds by phase"]
            shares = [
                f"{by_phase[p] / row['seconds measuring']:.0%}"
                for p in ("model", "factors", "spectra", "writing", "other")
            ]
            cells = [name, processes, f"{row['samples']:,}", f"{row['samples/s']:,.1f}", f"{row['tokens/s']:,.0f}", efficiency,
                     f"{by_phase['preparing']:.1f} s", *shares, f"{min(row['idle share']):.1%} to {max(row['idle share']):.1%}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if "CPU" in report["device"]:
        lines += ["All processes share the cores of one machine: this shows that they agree, not how they scale.", ""]
    for shape, row in report["processes"].get("1", {}).get("training", {}).items():
        for name in (key for key in row if key.startswith("seconds")):
            line = f"- {shape}, {name.removeprefix('seconds ')}: {row[name]:.1f} s in {row['batches']} batches of {row['tokens per batch']:,} tokens at most"
            scored = speeds.get("1", {}).get(f"{shape}, data parallel")
            lines.append(line + (f"; scoring took {scored['seconds'] / row[name]:.2f} times as long" if scored else ""))
    for processes, found in report["processes"].items():
        if "long" in found:
            row = found["long"]
            memory = f"{row['peak memory GiB']:.1f} GiB at most" if row["peak memory GiB"] else "memory not measured"
            lines.append(
                f"- {row['shape']}, 1 x {row['tokens']:,} tokens with checkpointing: {row['status']}, {row['seconds']:.1f} s, {memory}, weights {row['weights GiB']:.1f} GiB"
            )
        for name, differences in found.get("invariance", {}).items():
            lines.append(
                f"- {name}: largest relative difference of any feature from one sample at a time {max(differences.values()):.1e}"
            )
        if "failed" in found:
            lines.append(f"- {processes} processes failed: {found['failed'].strip().splitlines()[-1]}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["1.5b"])
    parser.add_argument("--samples", type=int, default=4000, help="of the speed part")
    parser.add_argument("--rows", type=int, default=48, help="of the invariance part")
    parser.add_argument("--longest", type=int, default=32_768, help="tokens of the long part")
    parser.add_argument("--data", help="rows with prompt and completion, in place of made-up ones")
    parser.add_argument(
        "--processes", type=int, default=max(torch.cuda.device_count(), 1), help="1, 2, 4, ... up to so many"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    if arguments.worker is not None:
        return work(arguments)
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    words = ["--shape", *arguments.shape]
    for name in ("samples", "rows", "longest"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--data", arguments.data] if arguments.data else []
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    report: dict = {
        "date": datetime.now(UTC).date().isoformat(), "device": device, "data": arguments.data or "log-normal lengths",
        "versions": versions(), "processes": {},
    }  # fmt: skip
    arguments.results.mkdir(exist_ok=True, parents=True)
    name = f"scaling_{re.sub(r'[^A-Za-z0-9]+', '-', device)}_{report['date']}"
    counts = [2**i for i in range(arguments.processes.bit_length())]
    with tempfile.TemporaryDirectory() as folder:
        for processes in sorted({*counts, arguments.processes}):
            parts = [part for part in arguments.parts or PARTS if part not in ALONE or processes == 1]
            if parts:
                report["processes"][str(processes)] = launch(parts, processes, Path(folder), words)
            (arguments.results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
            (arguments.results / f"{name}.md").write_text(table(report))
    print(table(report))
    if any("failed" in found for found in report["processes"].values()):
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
