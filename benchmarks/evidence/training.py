"""One short training with TRL after another in one process, and what each model has learned."""

from __future__ import annotations

import copy
import gc
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from numpy import ndarray as Array
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from selector.batching import collate, token_budget_batches
from selector.data.samples import Encoder, Sample
from selector.gradients.losses import reference_log_probs
from selector.scorer import load_model

EVALUATED_TOGETHER = {"cuda": 16384, "cpu": 2048}
"""Tokens of a batch of an evaluation."""


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common."""

    epochs: int = 2
    """Passes over a selection."""
    tokens_per_step: int = 2048
    """Mean tokens of an optimizer step: a selection of longer rows has fewer of them in a step, and as many steps."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; it falls to zero in the others."""


def prepare() -> str:
    """Quiet libraries, fast products of matrices; returns the device to train on."""
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


class Bench:
    """A base model that is trained again and again from the same weights.

    Args:
        path: checkpoint of the model.
        rows: with prompt and completion, of which every training takes some.
        settings: of all trainings.
    """

    def __init__(self, path: str, rows: Sequence[Mapping[str, Any]], settings: Settings) -> None:
        self.device = prepare()
        self.settings = settings
        self.base, self.tokenizer = load_model(path, "float32", device=self.device)
        columns = [{"prompt": row["prompt"], "completion": row["completion"], "row": i} for i, row in enumerate(rows)]
        # a trainer changes the forward of its model for good, and copies of that model would call the original's: copy first
        with self._trainer(copy.deepcopy(self.base), datasets.Dataset.from_list(columns)) as trainer:
            prepared = trainer.train_dataset
        assert isinstance(prepared, datasets.Dataset)
        self._place = {row: i for i, row in enumerate(prepared["row"])}
        self._lengths = np.array([len(tokens) for tokens in prepared["input_ids"]])
        self._prepared = prepared.remove_columns("row")
        gc.freeze()  # trainers collect garbage at every start: let them not look at what stays anyway

    def train(self, rows: Sequence[int], learning_rate: float, seed: int) -> tuple[PreTrainedModel, dict[str, float]]:
        """Train the base model on some of the rows.

        Args:
            rows: positions in the rows.
            learning_rate: its peak.
            seed: of the order.

        Returns:
            The model, and tokens, steps and seconds of the training.
        """
        places = [self._place[row] for row in rows]
        tokens = int(self._lengths[places].sum())
        batch = max(1, round(len(rows) * self.settings.tokens_per_step / tokens))
        steps = self.settings.epochs * math.ceil(len(rows) / batch)
        model = copy.deepcopy(self.base)
        with self._trainer(
            model, self._prepared.select(places), seed=seed, learning_rate=learning_rate, per_device_train_batch_size=batch,
            num_train_epochs=self.settings.epochs, warmup_steps=round(self.settings.warmup * steps),
        ) as trainer:  # fmt: skip
            seconds = trainer.train().metrics["train_runtime"]
        if trainer.state.global_step != steps:
            raise RuntimeError(f"{trainer.state.global_step} steps where {steps} were planned")
        return model, {"tokens": tokens * self.settings.epochs, "steps": steps, "train_seconds": seconds}

    @contextmanager
    def _trainer(self, model: PreTrainedModel, rows: datasets.Dataset, **options: Any) -> Iterator[SFTTrainer]:
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=self.device == "cpu", **options,
            )  # fmt: skip
            trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            yield trainer


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]]) -> list[Sample]:
    """Samples of prompts and completions, tokenized as for training."""
    encoder = Encoder(tokenizer, 4096, "error")
    contents = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    samples = list(encoder.encode(contents, [str(i) for i in range(len(rows))], [None] * len(rows)))
    bad = [f"row {sample.row}: {sample.status}" for sample in samples if sample.status != "ok"]
    if bad:
        raise ValueError(f"{len(bad)} rows cannot be evaluated: {', '.join(bad[:3])}")
    return samples


def log_likelihoods(model: PreTrainedModel, samples: Sequence[Sample]) -> Array:
    """[N] log-probability of each sample's completion, nats.

    Args:
        model: on any device.
        samples: from `encode`, in order.
    """
    found = np.zeros(len(samples))
    for batch in token_budget_batches(samples, EVALUATED_TOGETHER[model.device.type]):
        packed = collate(batch, 0, model.device)
        found[[sample.row for sample in batch]] = reference_log_probs(model, packed).double().cpu().numpy()
    return found


class Examination:
    """Held-out rows and choice questions, encoded once.

    Args:
        tokenizer: of the model.
        rows: clean rows with source, prompt and completion.
        questions: with task, prompt, choices and the position of the right one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Mapping[str, Any]],
        questions: Sequence[Mapping[str, Any]],
    ) -> None:
        self._rows = encode(tokenizer, [(row["prompt"], row["completion"]) for row in rows])
        self._sources = np.array([row["source"] for row in rows])
        self._choices = encode(tokenizer, [(q["prompt"], choice) for q in questions for choice in q["choices"]])
        self._questions = questions

    def __call__(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Loss (nats/token) by source, and the share of questions by task whose right choice is the likeliest of all.

        Args:
            model: trained or not.
        """
        nats, tokens = -log_likelihoods(model, self._rows), np.array([sample.n_loss_tokens for sample in self._rows])
        loss = {
            str(name): float(nats[self._sources == name].sum() / tokens[self._sources == name].sum())
            for name in np.unique(self._sources)
        }
        likelihoods = log_likelihoods(model, self._choices).tolist()
        answers: dict[str, list[bool]] = {}
        for question in self._questions:
            own, likelihoods = likelihoods[: len(question["choices"])], likelihoods[len(question["choices"]) :]
            answers.setdefault(question["task"], []).append(int(np.argmax(own)) == question["right"])
        return {"loss": loss, "accuracy": {task: float(np.mean(right)) for task, right in answers.items()}}
