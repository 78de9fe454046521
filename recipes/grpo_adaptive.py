"""GRPO on grade-school mathematics, drawing the problems that the model solves some of the time.

    python recipes/grpo_adaptive.py                                             the embedded model and rows, on CPU
    accelerate launch recipes/grpo_adaptive.py --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k.jsonl

A completion is rewarded when its last number is the answer. A group whose rewards are all equal teaches nothing; the
sampler learns from the rewards which prompts give such groups and draws others, those with the richest gradient spectra
first: by the scores of the data set, or with --live by those of the policy gradients as training computes them. Prompts that
no completion ever solved are drawn rarely from then on, and their rows are written to OUTPUT/demonstrations.jsonl, for
instruction tuning on their answers (`sft_selected.py --data`).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from trl import GRPOConfig, GRPOTrainer

import selector
from selector.assets import POOL, TINY_MODEL
from selector.integrations.trl import attach
from selector.sampling import RewardSignal, TapSignal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands separators."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def correct(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for a completion that ends in the answer, else 0."""
    return [float(last_number(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="path or hub name")
    parser.add_argument(
        "--data", default=str(POOL), help="JSON lines with prompt and a completion that ends in the answer"
    )
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--output", type=Path, default=Path("grpo_adaptive"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--live", action="store_true", help="follow spectra of the policy gradients")
    options = parser.parse_args()

    state = PartialState()
    dataset = datasets.Dataset.from_json(options.data)
    if "source" in dataset.column_names:
        dataset = dataset.filter(lambda row: "gsm8k" in row["source"])
    dataset = dataset.map(lambda row: {"answer": last_number(row["completion"]) or ""}).filter(
        lambda row: row["answer"]
    )
    model, tokenizer = selector.load_model(options.model)
    config = selector.ScoreConfig(id_column=options.id_column, projections=("q", "k", "v", "o"))
    store = selector.score_dataset(model.to(state.device), tokenizer, dataset, options.output / "features", config)
    selection = selector.select(selector.score(store, by="effective_rank", control="length"), budget="80%")

    args = GRPOConfig(
        output_dir=str(options.output), max_steps=options.steps, per_device_train_batch_size=8, num_generations=8,
        gradient_accumulation_steps=4, max_completion_length=200, learning_rate=1e-6, logging_steps=1, save_steps=50,
        report_to="none", bf16=state.device.type == "cuda",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset.remove_columns("completion"),
        processing_class=tokenizer,
        reward_funcs=correct,
    )
    signal = RewardSignal(
        richness=0.5,
        spectra=TapSignal(richness=0.5) if options.live else None,
        on_unsolved=lambda ids: print(f"left to demonstrations: {len(ids)} prompts, {ids[0]} among them"),
    )
    attach(trainer, selection, online=signal)
    trainer.train()
    if state.is_main_process:
        unsolved = set(trainer._get_train_sampler().ids[signal.unsolved()].tolist())
        rows = dataset.filter(lambda row: str(row[options.id_column]) in unsolved)
        rows.to_json(options.output / "demonstrations.jsonl")


if __name__ == "__main__":
    main()
