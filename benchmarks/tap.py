"""What it costs to measure spectra in a trainer's own backward pass, or between its steps.

    python benchmarks/tap.py                          on a GPU of 141 GB a Llama of 7 B parameters and 16 x 512 tokens; on a CPU a tiny one
    python benchmarks/tap.py --time-limit 300         what is not measured by then is left out of the table

Times forward and backward passes of a stock `transformers.Trainer` with random weights and tokens, plain and with q, k, v
and o tapped in all layers, in one layer of four, and in as many as a share of 5 % allows; and a refresh, which scores a
batch of samples again between two steps. The optimizer's step is not counted, so that the shares are upper bounds. Prints
a table and writes it to benchmarks/results/tap-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from selector.integrations._refresh import Refresh
from selector.integrations._tap import PLAIN_STEPS, TAPPED_STEPS, Tap
from selector.sampling import AdaptiveSampler, RefreshSignal, TapSignal
from selector.selection import Selection

MEASURED_STEPS = 6
STEPS_BETWEEN_REFRESHES = 50
SIZES = {"hidden": (4096, 256), "layers": (32, 8), "samples": (16, 4), "tokens": (512, 64)}
"""Of the model and its batches: on a GPU, on a CPU."""
logger = logging.getLogger("tap")


class OutOfTime(Exception):
    """The time limit was met in the middle of a case."""


class RandomTokens(Dataset):
    """Samples of one length whose tokens are all predicted."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        self.rows = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.rows[i]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class Measuring(TrainerCallback):
    """Tell a tap or a refresh where training is, as `selector.integrations.trl.attach` does, and time the refreshes."""

    def __init__(self, part: Tap | Refresh, times: list[float]) -> None:
        self.part, self.times = part, times

    def on_train_begin(self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any) -> None:
        self.part.begin(0, train_dataloader)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.part, Refresh):
            wait()
            began = time.perf_counter()
            self.part.step_ended(state.global_step, state.global_step)
            wait()
            self.times.append(time.perf_counter() - began)


def seconds_of_a_step(model: Any, options: argparse.Namespace, signal: TapSignal | RefreshSignal | None) -> float:
    """Time of a forward and backward pass, after warming up and deciding; of a `RefreshSignal`, of a refresh."""
    deciding = isinstance(signal, TapSignal) and signal.share is not None
    skipped = PLAIN_STEPS + TAPPED_STEPS + 1 if deciding else 2
    steps = skipped + MEASURED_STEPS * (4 if deciding else 1)
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
    trainer.remove_callback(PrinterCallback)  # its summary of a training says nothing here
    times: list[float] = []
    refreshes: list[float] = []
    if signal is not None:
        picked = Selection(
            ids=np.array([f"{i:06d}" for i in range(count)]), rows=np.arange(count), weights=np.ones(count), scores=np.arange(count) / count,
            n_tokens=np.full(count, options.tokens), reasons=np.full(count, ""),
        )  # fmt: skip
        sampler = AdaptiveSampler(picked, signal, batch_size=options.samples)
        part = Tap(trainer, sampler, signal) if isinstance(signal, TapSignal) else Refresh(trainer, sampler, signal)
        trainer._get_train_sampler = lambda *_: sampler
        if isinstance(part, Tap):
            part.install()
        trainer.add_callback(Measuring(part, refreshes))
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        if time.perf_counter() > options.deadline:
            raise OutOfTime
        wait()
        began = time.perf_counter()
        loss = step(*args, **kwargs)
        wait()
        times.append(time.perf_counter() - began)
        logger.info("  step %d of %d: %.3f s", len(times), steps, times[-1])
        return loss

    trainer.training_step = timed
    trainer.train()
    measured = (refreshes or times)[skipped:]
    return (
        statistics.mean(measured) if isinstance(signal, TapSignal) and signal.every > 1 else statistics.median(measured)
    )


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lines_of(model: Any, options: argparse.Namespace) -> Iterator[str]:
    """Rows of the table, as they are measured."""
    logger.info("no layer")
    plain = seconds_of_a_step(model, options, None)
    yield f"| no layer | {plain:.3f} | - | - | - |"
    cases = {
        "all layers": {"share": None},
        "one layer in four": {"share": None, "stride": 4},
        "a share of 5 %": {"share": 0.05},
    }
    for name, settings in cases.items():
        logger.info(name)
        signal = TapSignal(**settings)
        seconds = seconds_of_a_step(model, options, signal)
        yield f"| {name} | {seconds:.3f} | {seconds / plain - 1:.1%} | {signal.layers} | {signal.every} |"
    logger.info("refresh")
    scored = options.samples / (options.samples * (2 + MEASURED_STEPS))
    seconds = seconds_of_a_step(model, options, RefreshSignal(every=1, pool_share=scored))
    mean = plain + seconds / STEPS_BETWEEN_REFRESHES
    yield (
        f"| all layers, of {options.samples} samples scored again in {seconds:.3f} s | {mean:.3f} | {mean / plain - 1:.1%} | "
        f"{options.layers} | {STEPS_BETWEEN_REFRESHES} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    for name, sizes in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=sizes[0 if gpu else 1], help="default: %(default)s here")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds from the start; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.deadline = time.perf_counter() + options.time_limit
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 128, 1), vocab_size=32000, max_position_embeddings=options.tokens,
    )  # fmt: skip
    logger.info("making the model: %d layers of width %d", options.layers, options.hidden)
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# Spectra from the trainer's own backward pass, and between its steps", "",
        f"{datetime.date.today()}, {device}, torch {torch.__version__}; {model.num_parameters() / 1e9:.2g} B parameters, "
        f"{options.samples} x {options.tokens} tokens, checkpointing {options.checkpointing}", "",
        "| q, k, v, o of | step, s | overhead | layers | one step in |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    head = len(lines)
    try:
        for line in lines_of(model, options):
            lines.append(line)
            print(line, flush=True)
    except OutOfTime:
        if len(lines) == head:
            parser.exit(1, f"nothing was measured within {options.time_limit:g} s; raise --time-limit\n")
        lines += ["", f"The rest was not measured within the limit of {options.time_limit:g} s."]
    report = "\n".join([*lines, ""])
    print(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"tap-{datetime.date.today()}.md").write_text(report)


if __name__ == "__main__":
    main()
