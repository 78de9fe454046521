"""Spectra from a trainer's own backward pass.

Hooks read the factors of chosen layers while the trainer computes its gradients, so that a sample's spectrum costs the
solver's time alone, and none of it is stored. Effective and stable rank do not depend on how a trainer scales its loss.
Norms do: they are brought to the scale of a sample that is alone, which needs what the trainer divided its loss by and
what reached the loss in the backward pass (accumulation, processes, loss scaling).

How many layers to measure is decided once, from timed steps on the first process, and kept in the checkpoint: what is
measured never depends on the clock of one process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from selector.errors import IntegrationError
from selector.gradients.capture import GradientCapture, LayerFactors
from selector.gradients.targets import find_targets
from selector.gradients.tokens import Segment
from selector.integrations._compat import pair_inputs  # pyright: ignore[reportMissingImports]
from selector.integrations._trainers import SAMPLE_COLUMN, generates, is_kind, other_loss  # pyright: ignore[reportMissingImports]
from selector.sampling.sampler import SelectionSampler
from selector.sampling.spectral import TapSignal, evenly_spaced
from selector.spectra import Core, measures, reduce_factors, solve

SCALE_FREE = ("effective_rank", "stable_rank")
PLAIN_STEPS, TAPPED_STEPS = 6, 4
"""Steps timed to decide how many layers to measure; the first third of each is left out."""

POSITIONS = "selector_positions"
"""Where a generation's batch keeps the sampler position of each rollout; shuffled and split along with the rollouts."""


class Tap:
    """Measures samples during a trainer's steps and tells the sampler's signal.

    Args:
        trainer: trains on what `sampler` draws.
        sampler: draws with the weights of `signal`.
        signal: takes the measurements.
    """

    def __init__(self, trainer: Any, sampler: SelectionSampler, signal: TapSignal) -> None:
        self.trainer, self.sampler, self.signal = trainer, sampler, signal
        self.seconds = 0.0
        self.step = 0
        self._generates, self._pairs = generates(trainer), is_kind(trainer, "DPOTrainer")
        self._tapping = False
        self._plain: list[float] = []
        self._tapped: list[float] = []

    def install(self) -> None:
        """Take part in the trainer's steps."""
        trainer = self.trainer
        self._training_step, self._compute_loss = trainer.training_step, trainer.compute_loss
        trainer.training_step, trainer.compute_loss = self.training_step, self.compute_loss
        if self._generates:
            self._generate = trainer._generate_and_score_completions
            trainer._generate_and_score_completions = self.generate
            self._position = {sample_id: i for i, sample_id in enumerate(self.sampler.ids.tolist())}

    def begin(self, step: int, loader: Any) -> None:
        """Training begins or continues.

        Args:
            step: forward steps so far, over all epochs.
            loader: of the training data.
        """
        self.step, self._steps_in_epoch = step, len(loader)
        self._model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        everything = find_targets(self._model, self.signal.projections)
        self._indices = sorted({target.spec.layer for target in everything})
        if self.signal.layers == 0 and self.signal.share is None:
            self.signal.layers = -(-len(self._indices) // self.signal.stride)
        self._choose(self.signal.layers or len(self._indices))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's step, measured when its turn has come."""
        step, self.step = self.step, self.step + 1
        if self.signal.layers == 0:
            return self._timed_step(*args, **kwargs)
        if step % self.signal.every:
            return self._training_step(*args, **kwargs)
        loss = self._tapped_step(*args, **kwargs)
        began = time.perf_counter()
        found = gather_object(self._found)
        if found:
            positions, values, tokens = (np.array(column) for column in zip(*found, strict=True))
            # one pass over the rollouts of a generation, which may split a prompt's among its steps, is one visit
            visit = step // self.trainer.args.steps_per_generation if self._generates else None
            self.signal.observe(positions, values.astype(float), tokens, step, visit)
        self.seconds += time.perf_counter() - began
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss; says which tokens belong to which sample."""
        if not (self._tapping and model.training):
            return self._compute_loss(model, inputs, *args, **kwargs)
        segments, self._tokens, self._rows = self._samples(inputs)
        self._capture.begin(samples=len(self._tokens), segments=segments)
        items = kwargs.get("num_items_in_batch")
        loss = self._compute_loss(model, inputs, *args, **kwargs)
        self._reached = torch.ones(())
        (loss[0] if isinstance(loss, tuple) else loss).register_hook(self._note_reached)
        self._divisor = self._loss_divisor(items)
        return loss

    def generate(self, inputs: Any) -> Any:
        """The trainer's generation, with the sampler position of each rollout beside it."""
        output = self._generate(inputs)
        if self.trainer.model.training:
            positions = [self._position[row[SAMPLE_COLUMN]] for row in inputs]
            output[POSITIONS] = torch.tensor(positions, device=output["completion_ids"].device)
        return output

    def _note_reached(self, gradient: Tensor) -> None:
        self._reached = gradient.detach()

    def _choose(self, count: int) -> None:
        """Measure so many layers from now on, evenly spaced."""
        layers = evenly_spaced(self._indices, count)
        self._capture = GradientCapture(
            self._model, find_targets(self._model, self.signal.projections, layers), self._take
        )

    def _timed_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One of the first steps, whose times decide how many layers to measure."""
        plain = len(self._plain) < PLAIN_STEPS
        self._wait()
        began = time.perf_counter()
        loss = (self._training_step if plain else self._tapped_step)(*args, **kwargs)
        self._wait()
        (self._plain if plain else self._tapped).append(time.perf_counter() - began)
        if len(self._tapped) == TAPPED_STEPS:
            step, tapped = (statistics.median(t[len(t) // 3 :]) for t in (self._plain, self._tapped))
            assert self.signal.share is not None
            plan = list(affordable(self.signal.share, step, tapped, len(self._indices)))
            broadcast_object_list(plan)
            self.signal.layers, self.signal.every = plan
            self._choose(self.signal.layers)
        return loss

    def _tapped_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._cores: list[Core] = []
        with self._capture, self._gradients_reach_the_first_layer():
            self._tapping = True
            loss = self._training_step(*args, **kwargs)
            began = time.perf_counter()
            self._capture.finish()
        self._tapping = False
        self._found = self._measured()
        self.seconds += time.perf_counter() - began
        return loss

    @contextmanager
    def _gradients_reach_the_first_layer(self) -> Iterator[None]:
        """Beside adapters the embeddings require no gradient, and then no layer before the first adapter would have one."""

        def require(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return output.requires_grad_(True) if torch.is_grad_enabled() else output

        handle = self._model.get_input_embeddings().register_forward_hook(require)
        try:
            yield
        finally:
            handle.remove()

    def _take(self, factors: LayerFactors) -> None:
        began = time.perf_counter()
        self._cores += reduce_factors(factors.x, factors.deltas)
        self.seconds += time.perf_counter() - began

    def _measured(self) -> list[tuple[int, float, int]]:
        """Position, mean measure over the layers, and loss tokens of each sample of this process."""
        spectra = solve(self._cores)
        self._cores = []
        scale = self._divisor / self._reached.double().to(self._divisor.device)
        # spectra of one length are measured together: hundreds of layers would be thousands of small calls
        by_length: dict[int, list[Tensor]] = {}
        for sigma in spectra:
            by_length.setdefault(sigma.shape[-1], []).append(sigma)
        measure = measures[self.signal.measure]
        values = torch.cat([measure(torch.stack(same) * scale[:, None]) for same in by_length.values()])
        return list(zip(self._rows, values.mean(0).tolist(), self._tokens.tolist(), strict=False))

    def _samples(self, inputs: Any) -> tuple[Sequence[Segment], Tensor, list[int]]:
        """Where each sample's tokens are, how many of them carry loss, and which samples they are."""
        if self._generates:
            return (), inputs["completion_mask"].sum(1), inputs[POSITIONS].tolist()
        batch = self.trainer.args.train_batch_size
        accelerator = self.trainer.accelerator
        start = ((self.step - 1) % self._steps_in_epoch * accelerator.num_processes + accelerator.process_index) * batch
        rows = self.sampler.drawn()[start : start + batch].tolist()  # shorter where an epoch's last batch is filled up
        if self._pairs:
            inputs = pair_inputs(self.trainer, inputs)
            count, length = inputs["input_ids"].shape
            half = count // 2
            sides = [(i % half, i * length, (i + 1) * length) for i in range(count)]
            tokens = inputs["completion_mask"].sum(1)
            return sides, tokens[:half] + tokens[half:], rows
        predicted = inputs["labels"][:, 1:] != -100
        if "attention_mask" in inputs or inputs["input_ids"].shape[0] > 1:
            return (), predicted.sum(1), rows
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], inputs["input_ids"].shape[1]]
        tokens = torch.stack([predicted[0, a : b - 1].sum() for a, b in zip(starts, ends, strict=True)])
        return [(i, a, b) for i, (a, b) in enumerate(zip(starts, ends, strict=True))], tokens, rows

    def _loss_divisor(self, items: Any) -> Tensor:
        """[N] what a sample's own loss was divided by beyond its own tokens, before the trainer's backward pass."""
        tokens = self._tokens.double().clamp(min=1)
        if self.signal.measure in SCALE_FREE:
            return torch.ones_like(tokens)
        if self._pairs:
            return torch.full_like(tokens, len(tokens))
        args = self.trainer.args
        total = tokens.sum() if items is None else torch.as_tensor(items).double().to(tokens.device)
        if items is not None and args.average_tokens_across_devices:
            total = total / self.trainer.accelerator.num_processes
        return total / tokens

    def _wait(self) -> None:
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()


def affordable(share: float, step: float, tapped: float, layers: int) -> tuple[int, int]:
    """How many layers to measure, and one step in how many, to stay within a share of the time.

    Args:
        share: of a plain step's time.
        step: seconds of a plain step.
        tapped: seconds of a step with all layers measured.
        layers: how many those are.
    """
    count = share * step / max(tapped - step, 1e-9) * layers
    return min(max(int(count), 1), layers), 1 if count >= 1 else math.ceil(1 / count)


def tap_problem(trainer: Any, signal: TapSignal) -> IntegrationError | None:
    """What about a trainer keeps its samples from being measured, if anything."""
    other = [] if signal.measure in SCALE_FREE else other_loss(trainer)
    if signal.measure not in SCALE_FREE and generates(trainer):
        other = ["a policy-gradient loss"]
    reasons = {
        "a trainer whose loss is not a sum over rows of the data set": is_kind(trainer, "KTOTrainer"),
        "pairs without padding": is_kind(trainer, "DPOTrainer") and getattr(trainer, "padding_free", False),
        "split_batches=True": trainer.accelerator.split_batches,
        **{f"{signal.measure} under {setting}": True for setting in other},
    }
    found = [reason for reason, wrong in reasons.items() if wrong]
    if not found:
        return None
    return IntegrationError(
        "samples cannot be measured in this trainer's backward pass", got="; ".join(found),
        allowed="SFT, DPO, GRPO, RLOO and plain trainers; where losses are scaled in other ways, " + " or ".join(SCALE_FREE),
    )  # fmt: skip
