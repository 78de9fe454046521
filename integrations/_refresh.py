"""Scores of a part of the pool, taken again with the current weights between two steps of a training run.

The samples are the rows as the trainer's own collator makes them, so their tokens and loss masks are those that are trained
on; their losses and spectra are those of the offline scorer, which does the work. The pass runs without dropout, on weights
that require no gradients meanwhile, and every rank takes its share: what the run itself computes and draws stays as it was
but for the new weights of the sampler, which are the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object

from selector.batching import Batch, collate, deal, token_budget_batches
from selector.data.samples import Sample, TokenSequence
from selector.errors import IntegrationError, SelectorError
from selector.gradients.losses import LossSettings, reference_log_probs
from selector.gradients.targets import find_targets
from selector.integrations._compat import pair_inputs  # pyright: ignore[reportMissingImports]
from selector.integrations._trainers import generates, is_kind, other_loss  # pyright: ignore[reportMissingImports]
from selector.sampling.sampler import SelectionSampler
from selector.sampling.spectral import RefreshSignal, evenly_spaced
from selector.scorer.features import FeatureExtractor
from selector.scorer.measure import measure, measure_in_step, padded_tokens
from selector.scorer.processes import of_each
from selector.scorer.sharding import is_sharded

READ = {
    "input_ids", "attention_mask", "labels", "position_ids", "completion_mask", "ref_chosen_logps", "ref_rejected_logps",
    "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
"""What collators give for rows of text: whatever else a model is fed cannot be scored."""


class Refresh:
    """Scores samples again between a trainer's steps and tells the sampler's signal.

    Args:
        trainer: trains on what `sampler` draws.
        sampler: draws with the weights of `signal`.
        signal: says which samples are due, and takes their scores.
    """

    def __init__(self, trainer: Any, sampler: SelectionSampler, signal: RefreshSignal) -> None:
        self.trainer, self.sampler, self.signal = trainer, sampler, signal
        self.seconds = 0.0
        self._pairs = is_kind(trainer, "DPOTrainer")

    def begin(self, step: int, loader: Any) -> None:
        """Training begins or continues.

        Args:
            step: forward steps so far, over all epochs.
            loader: of the training data, which knows the trainer's rows and collator.

        Raises:
            IntegrationError: the collator makes of a row what cannot be scored.
        """
        self._rows, self._collate_fn = loader.dataset, loader.collate_fn
        trainer, signal = self.trainer, self.signal
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._sharded = is_sharded(self._model)
        everything = find_targets(self._model, signal.projections)
        indices = sorted({target.spec.layer for target in everything})
        layers = evenly_spaced(indices, -(-len(indices) // signal.stride))
        self._extractor = FeatureExtractor(
            self._model, [target for target in everything if target.spec.layer in layers], "auto",
            loss=LossSettings(name="dpo", beta=trainer.args.beta) if self._pairs else LossSettings(),
            # the model's own recomputation is off where dropout is, and what it saves may be needed
            checkpoint=any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules()),
        )  # fmt: skip
        self._sample(0)

    def step_ended(self, global_step: int, step: int) -> None:
        """Score what is due, where its turn has come.

        Args:
            global_step: optimizer steps so far.
            step: forward steps so far.
        """
        if global_step % self.signal.every:
            return
        began = time.perf_counter()
        due = self.signal.due(self.sampler.weights(), step)
        found = dict(gather_object(self._scores([self._sample(position) for position in due.tolist()])))
        values, tokens = (np.array(column) for column in zip(*(found[i] for i in due.tolist()), strict=True))
        self.signal.refreshed(due, values.astype(float), tokens, step)
        self.seconds += time.perf_counter() - began

    def _scores(self, due: Sequence[Sample]) -> list[tuple[int, tuple[float, int]]]:
        """Position, mean measure over the layers, and loss tokens of each sample of this process's share."""
        state = PartialState()
        mine = deal(due, state.num_processes)[state.process_index]
        # what a training step may take, a pass without gradients of weights may take too
        budget = self.trainer.args.train_batch_size * max(padded_tokens([sample]) for sample in due)
        filler = min(due, key=lambda sample: (sample.n_tokens, sample.row))
        rounds = max(of_each(len(token_budget_batches(mine, budget)), state)) if self._sharded else 0
        if self._pairs:
            mine = self._with_references(mine, budget, rounds, filler)
        found: list[tuple[int, tuple[float, int]]] = []

        def take(row: dict[str, Any]) -> None:
            values = row[self.signal.measure]
            value = float("nan") if values is None else float(np.nanmean(values.astype(np.float64)))
            found.append((row["row"], (value, row["n_loss_tokens"])))

        batches = token_budget_batches(mine, budget)
        with self._extractor.attached():
            if self._sharded:
                batches += [[]] * (rounds - len(batches))
                measure_in_step(self._extractor, take, batches, filler, self._collate)
            else:
                measure(self._extractor, take, batches, budget, self._collate)
        return found

    def _with_references(self, mine: Sequence[Sample], budget: int, rounds: int, filler: Sample) -> list[Sample]:
        """Pairs with the log-probabilities that the trainer's reference gives them, where the rows hold none.

        Done before the model is hooked: to switch adapters off and on makes them require gradients.
        """
        if all(sequence.reference is not None for sample in (*mine, filler) for sequence in sample.sequences):
            return list(mine)
        batches = token_budget_batches(mine, budget)
        batches += [[filler]] * (rounds - len(batches))
        complete: dict[int, Sample] = {}
        for samples in batches:
            batch = self._collate(samples)
            if self.trainer.ref_model is not None:
                found = reference_log_probs(self.trainer.ref_model, batch)
            else:
                with _reference_adapter(self._model):
                    found = reference_log_probs(self._model, batch)
            for sample, values in zip(samples, found.reshape(len(samples), -1).tolist(), strict=True):
                sequences = zip(sample.sequences, values, strict=True)
                complete[sample.row] = replace(
                    sample, sequences=tuple(replace(sequence, reference=value) for sequence, value in sequences)
                )
        return [complete[sample.row] for sample in mine]

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, pad_token_id=0, device=self.trainer.accelerator.device)

    def _sample(self, position: int) -> Sample:
        """A sample in the tokens that the trainer trains on; its `row` is its position in the sampler's `ids`."""
        inputs = self._collate_fn([self._rows[int(self.sampler.rows[position])]])
        if self._pairs:
            inputs = pair_inputs(self.trainer, inputs)
        input_ids, loss = inputs["input_ids"], inputs.get("completion_mask" if self._pairs else "labels")
        unread = sorted(set(inputs) - READ)
        if unread or loss is None or loss.shape != input_ids.shape:
            raise IntegrationError(
                "the trainer's batches cannot be scored", got=", ".join(inputs),
                allowed="input_ids with labels, or with completion_mask where a row is a preference pair",
                fix="say online='tap', or leave online out",
            )  # fmt: skip
        masks = loss.bool() if self._pairs else loss != -100
        attended = inputs.get("attention_mask", torch.ones_like(input_ids)).bool()
        references = [inputs.get(f"ref_{side}_logps") for side in ("chosen", "rejected")] if self._pairs else [None]
        sequences = []
        for tokens, mask, kept, reference in zip(input_ids, masks, attended, references, strict=True):
            mask = mask[kept].numpy().copy()
            mask[:1] = False
            ids = tokens[kept].numpy().astype(np.int32)
            sequences.append(TokenSequence(ids, mask, None if reference is None else float(reference)))
        return Sample(str(self.sampler.ids[position]), position, None, tuple(sequences))


@contextmanager
def _reference_adapter(model: Any) -> Iterator[None]:
    """A model of peft as TRL's reference: with the adapter `ref` where there is one, else without any."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = model.active_adapter
    try:
        if "ref" in model.peft_config:
            model.set_adapter("ref")
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        model.set_adapter(active)
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)


def refresh_problems(trainer: Any) -> list[SelectorError]:
    """What about a trainer keeps its samples from being scored again between its steps."""
    if generates(trainer):
        return [
            IntegrationError(
                "samples whose rollouts are generated cannot be scored again between steps, since old rollouts do not show what "
                "the current weights would do", got=type(trainer).__name__, allowed="SFTTrainer, DPOTrainer, Trainer",
                fix="say online='tap', which measures the rollouts that training generates anyway, or online='rewards'",
            )
        ]  # fmt: skip
    kind = trainer.accelerator.distributed_type
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    reasons = {
        "a trainer whose loss is not a sum over rows of the data set": is_kind(trainer, "KTOTrainer"),
        "a collator that masks tokens at random": getattr(trainer.data_collator, "mlm", False),
        "DeepSpeed": kind == DistributedType.DEEPSPEED,
        "FSDP in version 1": kind == DistributedType.FSDP and getattr(fsdp, "fsdp_version", 1) == 1,
        **dict.fromkeys(other_loss(trainer), True),
    }
    found = [reason for reason, wrong in reasons.items() if wrong]
    if not found:
        return []
    return [
        IntegrationError(
            "samples cannot be scored again between this trainer's steps", got="; ".join(found),
            allowed="mean cross-entropy and DPO, on one process, DDP or FSDP2", fix="say online='tap', or leave online out",
        )
    ]  # fmt: skip
