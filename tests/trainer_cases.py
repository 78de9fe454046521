"""Real trainers on the tiny model, built by name, with a record of the samples that each training step saw.

The tests import it for one process. For two, `torchrun` runs it with a file of cases, and every rank writes what it saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from selector.selection import Selection
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

WORDS = "river stone cloud forest engine market garden winter silver bridge".split()


def sentence(i: int) -> str:
    """A short text that no other number gives."""
    return f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100 % 10]}"


def dataset(n: int, kind: str) -> Dataset:
    """[n] rows with ids `s0`, `s1`, ... in the columns that a trainer of this kind reads."""
    prompts = [f"Question {i}: {sentence(i)}" for i in range(n)]
    columns: dict[str, list[Any]] = {"id": [f"s{i}" for i in range(n)], "prompt": prompts}
    if kind == "sft":
        columns["completion"] = [f" {sentence(i + 7)}." for i in range(n)]
    return Dataset.from_dict(columns)


def selection(ids: list[str], weights: list[float] | None = None) -> Selection:
    """A selection of these samples."""
    k = len(ids)
    return Selection(
        ids=np.array(ids), rows=np.array([int(i[1:]) for i in ids]), weights=np.array(weights or [1.0] * k),
        scores=np.linspace(1.0, 0.0, k), n_tokens=np.full(k, 10), reasons=np.array(["test"] * k),
    )  # fmt: skip


def sft(model_path: Path, out: Path, data: Dataset, **options: Any) -> Any:
    """A stock SFT trainer of three tiny steps' size."""
    from trl import SFTConfig, SFTTrainer

    settings = dict(
        output_dir=str(out), per_device_train_batch_size=2, learning_rate=1e-4, logging_strategy="no", report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=64, disable_tqdm=True, seed=5, optim="sgd",
    )  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model_path), args=SFTConfig(**(settings | options)),
    )  # fmt: skip


def record(trainer: Any) -> list[list[str]]:
    """Let a trainer note the ids of the samples of every training step; the list fills as it trains."""
    seen: list[list[str]] = []
    step = trainer.training_step
    by_tokens = {tuple(row["input_ids"]): str(row["id"]) for row in trainer.train_dataset if "input_ids" in row}

    def noting_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = (row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
        seen.append([by_tokens[tuple(row.tolist())] for row in tokens])
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = noting_step
    return seen


class SaveAt(TrainerCallback):
    """Save one checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.step


def resume(
    model_path: Path, out: Path, *, attached: bool = True, n: int = 40, save_at: int, **options: Any
) -> dict[str, Any]:
    """Train once through and once more from the checkpoint of step `save_at`.

    Returns:
        `whole`: the samples of each training step of the first run; `resumed`: of the second one.
    """
    from selector.integrations.trl import attach

    seen: dict[str, list[list[str]]] = {}
    for run in ("whole", "resumed"):
        trainer = sft(model_path, out, dataset(n, "sft"), **options)
        if attached:
            attach(trainer, selection([f"s{i}" for i in range(3, n - 3)]))
        trainer.add_callback(SaveAt(save_at))
        seen[run] = record(trainer)
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{save_at}") if run == "resumed" else None)
    return seen


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest  # maps selector.integrations

    model_path, cases, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    results = {name: resume(model_path, out / name, **case) for name, case in cases.items()}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
