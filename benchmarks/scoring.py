"""Speed, scaling, memory and invariance of the scorer, on random weights of real shapes and no download.

    python benchmarks/scoring.py                     everything, on all GPUs of this machine (about five minutes)
    python benchmarks/scoring.py speed invariance    some parts
    python benchmarks/scoring.py --shape tiny --samples 40 --rows 8 --longest 512      a trial on a CPU

Each part runs in processes of its own, started by torchrun. Samples are Alpaca-like: unless --data names a file, prompts and
completions have log-normal numbers of tokens (medians 17 and 54, deviations 0.46 and 1.28 of the logarithm, at most 1,000),
as the 21,200 rows of the Alpaca union have, and random tokens.

    speed        samples/s end to end, tokenizing and writing included, on 1 and on all GPUs; and relative to training steps
                 (forward, backward, AdamW) on the same samples in the same batches
    invariance   features of the same samples across batch sizes, padding, processes and sharding, in float32
    long         one sequence of 32k tokens through the 7B shape with checkpointing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from selector import FeatureStore, ScoreConfig, score_dataset
from selector.assets import TINY_MODEL
from selector.batching import collate, join, token_budget_batches
from selector.data.layout import recognize
from selector.data.load import load_rows
from selector.data.samples import Encoder, Sample, TokenSequence
from selector.gradients.targets import find_targets
from selector.runtime import versions
from selector.scorer.features import FeatureExtractor
from selector.scorer.processes import process_state
from selector.types import MEASURES

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = {"tiny": 4096}
PROMPT, COMPLETION, MOST = (17, 0.46), (54, 1.28), 1000
WARM_UP = 64


def build_model(shape: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Qwen2ForCausalLM:
    """A model of random weights, the same on every process."""
    settings = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = Qwen2Config(
        **settings,
        vocab_size=VOCABULARY.get(shape, 151_936),
        max_position_embeddings=65_536,
        tie_word_embeddings=shape != "7b",
        dtype=dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_data(count: int, data: str | None) -> datasets.Dataset:
    """Rows of a file, or texts of random tokens with the lengths of Alpaca."""
    if data is not None:
        rows = load_rows(data)
        return rows.select(range(min(count, len(rows)))).select_columns(["prompt", "completion"])
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    rng = np.random.default_rng(0)
    # words that the tokenizer knows as one token each, so that a text of n words has about n tokens
    words = np.array(
        [
            word
            for token in range(300, 2000)
            if (word := tokenizer.decode([token])).startswith(" ") and word.strip().isalpha()
        ]
    )

    def texts(median: float, deviation: float) -> list[str]:
        lengths = np.clip(rng.lognormal(np.log(median), deviation, count), 1, MOST).astype(int)
        return ["".join(rng.choice(words, length)) for length in lengths]

    return datasets.Dataset.from_dict({"prompt": texts(*PROMPT), "completion": texts(*COMPLETION)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def part_speed(arguments: argparse.Namespace, out: Path) -> dict:
    """Score everything; one process alone also trains on the same batches."""
    state = process_state()
    device = state.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(arguments.shape, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    data = build_data(arguments.samples, arguments.data)
    warm = min(WARM_UP, len(data)) // state.num_processes * state.num_processes
    score_dataset(model, tokenizer, data.select(range(warm)), out / f"warm{state.num_processes}")
    state.wait_for_everyone()
    synchronize(device)
    started = time.perf_counter()
    store = score_dataset(model, tokenizer, data, out / f"speed{state.num_processes}")
    synchronize(device)
    seconds = time.perf_counter() - started
    entry = store.manifest.cost[-1]
    report = {
        "samples": entry["samples"], "tokens": entry["tokens"], "seconds": seconds, "seconds measuring": entry["seconds"],
        "samples/s": entry["samples"] / seconds, "tokens/s": entry["tokens"] / seconds, "tokens per batch": entry["tokens_per_batch"],
        "bytes per sample": entry["store_bytes"] / entry["samples"], "ledger's ratio to an epoch": entry["epoch_ratio"],
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    if state.num_processes == 1:
        report |= train(model, tokenizer, data, entry["tokens_per_batch"], device)
        report["scoring / training step"] = seconds / report["seconds training"]
        report["scoring / forward and backward"] = seconds / report["seconds forward and backward"]
    return report


def train(
    model: Qwen2ForCausalLM, tokenizer, data: datasets.Dataset, tokens_per_batch: int, device: torch.device
) -> dict:
    """Time of one epoch of full fine-tuning in the scorer's own batches: little padding, which favors training."""
    rows = recognize(data.column_names, ScoreConfig()).rows(data)
    samples = list(
        Encoder(tokenizer, 4096, "skip").encode(rows, [str(i) for i in range(len(data))], [None] * len(data))
    )
    batches = token_budget_batches([s for s in samples if s.status == "ok"], tokens_per_batch)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")

    def step(batch: list[Sample], update: bool) -> None:
        made = collate(batch, 0, device)
        labels = made.input_ids.masked_fill(~made.loss_mask, -100)
        model(
            input_ids=made.input_ids, attention_mask=made.attention_mask, labels=labels, use_cache=False
        ).loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def epoch(update: bool) -> float:
        synchronize(device)
        started = time.perf_counter()
        for batch in batches:
            step(batch, update)
        synchronize(device)
        return time.perf_counter() - started

    step(batches[0], True)
    return {"batches": len(batches), "seconds training": epoch(True), "seconds forward and backward": epoch(False)}


def part_invariance(arguments: argparse.Namespace, out: Path) -> dict:
    """Largest relative difference of any feature, against one process with one sample at a time."""
    state = process_state()
    model = build_model(arguments.shape, torch.float32, state.device, layers=4 if arguments.shape != "tiny" else None)
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
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(state.device.type, (state.num_processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
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
    """One long sequence with checkpointing: time and peak memory."""
    state = process_state()
    device = state.device
    shape = "7b" if arguments.shape != "tiny" else "tiny"
    model = build_model(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, arguments.longest).astype(np.int32)
    sample = Sample("long", 0, None, (TokenSequence(tokens, np.arange(len(tokens)) >= len(tokens) // 2),))
    extractor = FeatureExtractor(model, find_targets(model), "auto", checkpoint=True)
    with extractor.attached():
        (row,) = extractor(join([sample], device))
        synchronize(device)
        started = time.perf_counter()
        (row,) = extractor(join([sample], device))
        synchronize(device)
    return {
        "shape": shape, "tokens": len(tokens), "status": row["status"], "seconds": time.perf_counter() - started,
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "weights GiB": sum(p.nbytes for p in model.parameters()) / 2**30,
    }  # fmt: skip


PARTS = {"speed": part_speed, "invariance": part_invariance, "long": part_long}


def launch(part: str, processes: int, out: Path, words: list[str]) -> dict:
    """Run one part in processes of its own and return what the first reports."""
    result = out / f"{part}{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, part, "--worker", str(out), "--result", str(result), *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr[-3000:]}
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--samples", type=int, default=4000, help="of the speed part")
    parser.add_argument("--rows", type=int, default=48, help="of the invariance part")
    parser.add_argument("--longest", type=int, default=32_768, help="tokens of the long part")
    parser.add_argument("--data", help="rows with prompt and completion, in place of made-up ones")
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    if arguments.worker is not None:
        report = PARTS[arguments.parts[0]](arguments, arguments.worker)
        if process_state().is_main_process:
            arguments.result.write_text(json.dumps(report))
        return
    words = [
        "--shape",
        arguments.shape,
        "--samples",
        str(arguments.samples),
        "--rows",
        str(arguments.rows),
        "--longest",
        str(arguments.longest),
    ]
    words += ["--data", arguments.data] if arguments.data else []
    report: dict = {
        "date": datetime.now(UTC).date().isoformat(), "shape": arguments.shape, "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "data": arguments.data or "log-normal lengths", "versions": versions(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts or PARTS:
            for processes in dict.fromkeys([1] if part == "long" else [1, arguments.processes]):
                name = f"{part}, {processes} process" + ("es" if processes > 1 else "")
                report[name] = launch(part, processes, Path(folder), words)
                print(name, json.dumps(report[name], indent=1), flush=True)
    rates = [found["samples/s"] for name, found in report.items() if name.startswith("speed") and "samples/s" in found]
    if len(rates) == 2:
        report["speed-up"] = rates[1] / rates[0]
        print(f"speed-up with {arguments.processes} processes: {report['speed-up']:.2f}")
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / f"scoring-{arguments.shape}-{report['date']}.json").write_text(
        json.dumps(report, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
