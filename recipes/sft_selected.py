"""Instruction tuning on the samples whose gradients span the most directions, easy batches first.

    python recipes/sft_selected.py                                              the embedded model and rows, on CPU
    accelerate launch recipes/sft_selected.py --model Qwen/Qwen2.5-7B --data train.jsonl --budget 10% --id-column id

Scores the data set once (a second run finds the scores in OUTPUT/features), selects, and trains with TRL. With --online the
order is not fixed: samples come as often as their spectra under the current weights say, which are taken from the training's
own backward pass (tap) or by scoring a part of the selection again every 50 steps (refresh).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from accelerate import PartialState
from trl import SFTConfig, SFTTrainer

import selector
from selector.assets import POOL, TINY_MODEL
from selector.integrations.trl import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="path or hub name")
    parser.add_argument("--data", default=str(POOL), help="JSON lines with prompt and completion")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--budget", default="20%", help="samples, percent or tokens: 500, 20%%, 100000t")
    parser.add_argument("--output", type=Path, default=Path("sft_selected"))
    parser.add_argument("--online", choices=["tap", "refresh"], help="follow the spectra of the current model")
    parser.add_argument("--steps", type=int, default=-1, help="stop early")
    options = parser.parse_args()

    state = PartialState()
    dataset = datasets.Dataset.from_json(options.data)
    model, tokenizer = selector.load_model(options.model)
    config = selector.ScoreConfig(id_column=options.id_column, projections=("q", "k", "v", "o"))
    store = selector.score_dataset(model.to(state.device), tokenizer, dataset, options.output / "features", config)
    selection = selector.select(selector.score(store, by="effective_rank", control="length"), budget=options.budget)

    args = SFTConfig(
        output_dir=str(options.output), num_train_epochs=2, max_steps=options.steps, per_device_train_batch_size=8,
        learning_rate=2e-5, logging_steps=5, save_steps=50, report_to="none", bf16=state.device.type == "cuda",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    if options.online:
        attach(trainer, selection, online=options.online)
    else:
        strata = "source" if "source" in dataset.column_names else None
        attach(trainer, selection, curriculum="low-to-high", strata=strata)
    trainer.train()


if __name__ == "__main__":
    main()
