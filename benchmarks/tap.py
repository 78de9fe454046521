"""What it costs to measure spectra in a trainer's own backward pass.

    python benchmarks/tap.py                                   Llama of 7 B parameters, 16 x 512 tokens, one GPU of 141 GB
    python benchmarks/tap.py --hidden 256 --layers 8 --samples 4 --tokens 64       small enough for a CPU

Times forward and backward passes of a stock `transformers.Trainer` with random weights and tokens, plain and with q, k, v
and o tapped in all layers, in one layer of four, and in as many as a share of 5 % allows. The optimizer's step is not
counted, so that the shares are upper bounds. Prints a table and writes it to benchmarks/results/tap-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from selector.integrations._tap import PLAIN_STEPS, TAPPED_STEPS, Tap
from selector.sampling import AdaptiveSampler, TapSignal
from selector.selection import Selection

MEASURED_STEPS = 6


class RandomTokens(Dataset):
    """Samples of one length whose tokens are all predicted."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        self.rows = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.rows[i]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class Begin(TrainerCallback):
    """Tell the tap when training begins."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def on_train_begin(self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any) -> None:
        self.tap.begin(0, train_dataloader)


def seconds_of_a_step(model: Any, options: argparse.Namespace, signal: TapSignal | None) -> float:
    """Median time of a forward and backward pass, after warming up and deciding."""
    skipped = PLAIN_STEPS + TAPPED_STEPS + 1 if signal is not None and signal.share is not None else 2
    every = 1 if signal is None or signal.share is None else 4
    steps = skipped + MEASURED_STEPS * every
    count = options.samples * steps
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.samples, max_steps=steps, optim="sgd", report_to="none",
            learning_rate=0.0, max_grad_norm=0.0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=options.checkpointing, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=args, train_dataset=RandomTokens(count, options.tokens, model.config.vocab_size)
        )
    if signal is not None:
        picked = Selection(
            ids=np.array([f"{i:06d}" for i in range(count)]), rows=np.arange(count), weights=np.ones(count), scores=np.arange(count) / count,
            n_tokens=np.full(count, options.tokens), reasons=np.full(count, ""),
        )  # fmt: skip
        sampler = AdaptiveSampler(picked, signal, batch_size=options.samples)
        tap = Tap(trainer, sampler, signal)
        trainer._get_train_sampler = lambda *_: sampler
        tap.install()
        trainer.add_callback(Begin(tap))
    times: list[float] = []
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait()
        began = time.perf_counter()
        loss = step(*args, **kwargs)
        wait()
        times.append(time.perf_counter() - began)
        return loss

    trainer.training_step = timed
    trainer.train()
    del trainer
    measured = times[skipped:]
    return statistics.mean(measured) if signal is not None and signal.every > 1 else statistics.median(measured)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128, vocab_size=32000, max_position_embeddings=options.tokens,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    device = torch.cuda.get_device_name() if gpu else "CPU"
    lines = [
        "# Spectra from the trainer's own backward pass", "",
        f"{datetime.date.today()}, {device}, torch {torch.__version__}; {model.num_parameters() / 1e9:.1f} B parameters, "
        f"{options.samples} x {options.tokens} tokens, checkpointing {options.checkpointing}", "",
        "| q, k, v, o of | step, s | overhead | layers | one step in |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    plain = seconds_of_a_step(model, options, None)
    lines.append(f"| no layer | {plain:.3f} | - | - | - |")
    print(lines[-1], flush=True)
    cases = {
        "all layers": {"share": None},
        "one layer in four": {"share": None, "stride": 4},
        "a share of 5 %": {"share": 0.05},
    }
    for name, settings in cases.items():
        signal = TapSignal(**settings)
        seconds = seconds_of_a_step(model, options, signal)
        lines.append(f"| {name} | {seconds:.3f} | {seconds / plain - 1:.1%} | {signal.layers} | {signal.every} |")
        print(lines[-1], flush=True)
    report = "\n".join([*lines, ""])
    print(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"tap-{datetime.date.today()}.md").write_text(report)


if __name__ == "__main__":
    main()
