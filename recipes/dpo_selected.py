"""Preference tuning on the pairs whose gradients span the most directions.

    python recipes/dpo_selected.py                                              pairs made of the embedded rows, on CPU
    accelerate launch recipes/dpo_selected.py --model my-sft-model --data pairs.jsonl --budget 30% --id-column id

Pairs are scored by the spectrum of their DPO loss, selected, and trained on with TRL.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from accelerate import PartialState
from trl import DPOConfig, DPOTrainer

import selector
from selector.assets import POOL, TINY_MODEL
from selector.integrations.trl import attach


def pairs(path: str) -> datasets.Dataset:
    """Rows with prompt, chosen and rejected; made from prompts and completions when there are none: the completion is
    chosen, and rejected is that of the row before, which answers another question."""
    dataset = datasets.Dataset.from_json(path)
    if "chosen" in dataset.column_names:
        return dataset
    completions = list(dataset["completion"])
    dataset = dataset.add_column("rejected", completions[-1:] + completions[:-1])
    return dataset.rename_column("completion", "chosen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="path or hub name")
    parser.add_argument("--data", default=str(POOL), help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--budget", default="30%", help="samples, percent or tokens: 500, 30%%, 100000t")
    parser.add_argument("--output", type=Path, default=Path("dpo_selected"))
    parser.add_argument("--steps", type=int, default=-1, help="stop early")
    options = parser.parse_args()

    state = PartialState()
    dataset = pairs(options.data)
    model, tokenizer = selector.load_model(options.model)
    config = selector.ScoreConfig(id_column=options.id_column, loss="dpo", projections=("q", "k", "v", "o"))
    store = selector.score_dataset(model.to(state.device), tokenizer, dataset, options.output / "features", config)
    selection = selector.select(selector.score(store, by="effective_rank", control="length"), budget=options.budget)

    args = DPOConfig(
        output_dir=str(options.output), num_train_epochs=1, max_steps=options.steps, per_device_train_batch_size=4,
        learning_rate=5e-6, logging_steps=5, save_steps=50, report_to="none", bf16=state.device.type == "cuda",
    )  # fmt: skip
    trainer = DPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    attach(trainer, selection, strata="source" if "source" in dataset.column_names else None)
    trainer.train()


if __name__ == "__main__":
    main()
