"""Train on a selection with any trainer of TRL or transformers: `attach(trainer, selection)` before `trainer.train()`.

The trainer keeps its class and its data set; its train sampler is replaced, and how often each sample is repeated is read
from the sampler that it would have built, so that GRPO groups stay whole. Which epoch the sampler draws is told by a callback
from the trainer's count of steps: after a resume in the middle of an epoch, Accelerate's loaders tell a sampler nothing (in
several processes) or epoch 0 (before 1.15). The state of the sampler lies in each checkpoint.

Samples are matched by id, never by position, because trainers drop and shuffle rows while they prepare them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Shaped
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from selector.errors import ConfigError, IntegrationError, SelectorError, did_you_mean, raise_all
from selector.integrations._refresh import Refresh, refresh_problems  # pyright: ignore[reportMissingImports]
from selector.integrations._rollouts import keeps_rollouts, restore_rollouts, save_rollouts  # pyright: ignore[reportMissingImports]
from selector.integrations._rows import dataset_ids  # pyright: ignore[reportMissingImports]
from selector.integrations._tap import Tap, tap_problem  # pyright: ignore[reportMissingImports]
from selector.integrations._trainers import SAMPLE_COLUMN, generates  # pyright: ignore[reportMissingImports]
from selector.sampling.adaptive import AdaptiveSampler
from selector.sampling.order import Groups
from selector.sampling.sampler import NO_REPEATS, SelectionSampler
from selector.sampling.signals import FocusSignal, RewardSignal
from selector.sampling.spectral import RefreshSignal, TapSignal
from selector.sampling.state import load_state, save_state
from selector.selection import Selection

T = TypeVar("T", bound=Trainer)

OnlineSignal = RewardSignal | FocusSignal | TapSignal | RefreshSignal


def attach(
    trainer: T,
    selection: Selection,
    *,
    curriculum: str | None = None,
    strata: str | Shaped[np.ndarray, " K"] | None = None,
    online: OnlineSignal | str | None = None,
    coverage: float = 0.25,
    id_column: str | None = None,
    seed: int | None = None,
) -> T:
    """Make a trainer train on a selection of its data set.

    Args:
        trainer: any trainer of TRL or transformers whose data set has a length.
        selection: the samples to train on.
        curriculum: which samples come first, a name in `selector.sampling.CURRICULA`; shuffled by weight when None.
        strata: every batch gets its share of each stratum: a column of the train data set, such as its source, or a label
            for each sample of the selection, such as its cluster of near-duplicates. The shares of a column `source` are
            reported in any case.
        online: weights that follow the training: `"rewards"` or a `RewardSignal` for trainers that generate, which draws
            prompts that are neither certain nor hopeless, and may mix in spectra of their policy gradients; a
            `FocusSignal` moves through the selection by accuracy;
            `"tap"` or a `TapSignal` measures spectra in the trainer's own backward pass; `"refresh"` or a `RefreshSignal`
            scores a part of the selection again every so many steps. Each sample then comes as often as its weight says;
            otherwise once per epoch.
        coverage: with `online`, the share of each batch for the samples that have waited longest.
        id_column: column of the train data set that holds the sample ids; found by name or by content when None.
        seed: of the order; the trainer's `data_seed`, or its `seed`, when None.

    Returns:
        The trainer.

    Raises:
        IntegrationError: the trainer is set up in a way that loses which sample is which; all problems at once.
        SelectionError: its data set has none of the samples, or has one twice.
    """
    signal = _named_signal(online) if isinstance(online, str) else online
    raise_all(_problems(trainer, signal))
    args = trainer.args
    dataset: Any = trainer.train_dataset
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ids = dataset_ids(dataset, id_column, getattr(tokenizer, "eos_token", None), set(selection.ids.tolist()))
    groups = _groups(trainer._get_train_sampler(dataset))
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    options: dict[str, Any] = {
        "dataset_ids": ids,
        "seed": next(value for value in (seed, args.data_seed, args.seed) if value is not None),
        "batch_size": batch if groups == NO_REPEATS else groups.batch_size,
        "groups": groups,
    }
    if "source" in dataset.column_names:
        options["sources"] = _labels(dataset, ids, selection, "source")
    if signal is None:
        labels = _labels(dataset, ids, selection, strata) if isinstance(strata, str) else strata
        sampler = SelectionSampler(selection, curriculum=curriculum, strata=labels, **options)
    else:
        sampler = AdaptiveSampler(selection, signal, coverage=coverage, curriculum=curriculum, strata=strata, **options)
    if sampler.missing:
        warnings.warn(
            f"{len(sampler.missing)} of {len(selection)} selected samples are not in the trainer's data set and will not be "
            f"trained on, {sampler.missing[0]} among them; trainers drop rows whose loss tokens were all cut off",
            stacklevel=2,
        )
    if signal is not None and generates(trainer):
        trainer.train_dataset = dataset.add_column(SAMPLE_COLUMN, list(ids))  # reaches the reward functions' rows
    _Session(trainer, sampler).install(signal)
    return trainer


class _Session(TrainerCallback):
    """What one attached trainer needs while it trains."""

    def __init__(self, trainer: Any, sampler: SelectionSampler) -> None:
        self._trainer, self._sampler = trainer, sampler
        self._checkpoint: Path | None = None
        self._reported, self._began, self._seconds = 0, time.perf_counter(), 0.0
        self._known_rewards = False
        self._tap: Tap | None = None
        self._refresh: Refresh | None = None

    def install(self, signal: OnlineSignal | None) -> None:
        """Put the sampler in the trainer, and let its signal see what the trainer does."""
        trainer = self._trainer
        self._train, self._log = trainer.train, trainer.log
        trainer._get_train_sampler = lambda *_, **__: self._sampler
        self._set_epoch = self._sampler.set_epoch
        self._sampler.set_epoch = lambda epoch: None  # what the host says is not always right; see on_epoch_begin
        trainer.train, trainer.log = self._noting_train, self._extended_log
        if (tapped := _tapped(signal)) is not None:
            self._tap = tap = Tap(trainer, self._sampler, tapped)
            tap.install()
        if isinstance(signal, RefreshSignal):
            self._refresh = Refresh(trainer, self._sampler, signal)
        if isinstance(signal, RewardSignal | FocusSignal):
            self._position = {sample_id: i for i, sample_id in enumerate(self._sampler.ids.tolist())}
            self._calculate_rewards = trainer._calculate_rewards
            trainer._calculate_rewards, self._observe = self._observed_rewards, signal.observe
        trainer.add_callback(self)

    def _noting_train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self._trainer.args.output_dir)
        self._checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **kwargs: Any) -> None:
        groups = self._sampler.groups
        self._draws_per_step = train_dataloader.total_batch_size / (groups.mini_repeat_count * groups.repeat_count)
        self._steps_in_epoch = len(train_dataloader)
        if self._checkpoint is not None:
            self._resume(self._checkpoint, state)
        for measuring in filter(None, (self._tap, self._refresh)):
            measuring.begin(self._steps(state), train_dataloader)
        self._reported, self._began, self._seconds = 0, time.perf_counter(), self._spent()

    def _resume(self, checkpoint: Path, state: Any) -> None:
        """Take up the state of the checkpoint that training continues from."""
        if not load_state(self._sampler, checkpoint):
            warnings.warn(
                f"{checkpoint} holds no sampler state: it was made without the selection attached, so samples trained on "
                "before may come again in this epoch, and others not at all",
                stacklevel=2,
            )
        if keeps_rollouts(self._trainer):
            cycle = self._sampler.groups.repeat_count
            self._known_rewards = restore_rollouts(self._trainer, checkpoint, cycle, self._steps(state))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set_epoch(self._steps(state) // self._steps_in_epoch)
        self._reported = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._refresh is not None:
            self._refresh.step_ended(state.global_step, self._steps(state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_state(self._sampler, folder)
        if keeps_rollouts(self._trainer):
            save_rollouts(self._trainer, folder, self._sampler.groups.repeat_count)

    def _steps(self, state: Any) -> int:
        """Forward steps so far; the last optimizer step of an epoch may take fewer of them."""
        accumulation = self._trainer.args.gradient_accumulation_steps
        epochs, updates = divmod(state.global_step, -(-self._steps_in_epoch // accumulation))
        return epochs * self._steps_in_epoch + updates * accumulation

    def _spent(self) -> float:
        """Seconds that drawing and measuring took so far."""
        return self._sampler.seconds + sum(part.seconds for part in (self._tap, self._refresh) if part is not None)

    def _observed_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's rewards, gathered over all ranks, which the sampler sees in training."""
        rewards: torch.Tensor = self._calculate_rewards(inputs, *args, **kwargs)
        if self._trainer.model.training and not self._known_rewards:
            began = time.perf_counter()
            samples = gather_object([self._position[row[SAMPLE_COLUMN]] for row in inputs])
            weighted = rewards * self._trainer.reward_weights.to(rewards.device)
            total = weighted.nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)
            self._observe(np.array(samples), total.double().cpu().numpy())
            self._sampler.seconds += time.perf_counter() - began
        self._known_rewards = False
        return rewards

    def _extended_log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """The trainer's log with the sampler's figures, wherever the trainer reports to."""
        if "loss" in logs:
            last = round(
                (self._steps(self._trainer.state) % self._steps_in_epoch or self._steps_in_epoch) * self._draws_per_step
            )
            figures = self._sampler.metrics(self._reported, last)
            now, spent = time.perf_counter(), self._spent()
            figures["overhead"] = (spent - self._seconds) / (now - self._began)
            self._reported, self._began, self._seconds = last, now, spent
            logs |= {f"selector/{name}": value for name, value in figures.items()}
        return self._log(logs, *args, **kwargs)


def _named_signal(name: str) -> OnlineSignal:
    signals: dict[str, type[OnlineSignal]] = {"rewards": RewardSignal, "tap": TapSignal, "refresh": RefreshSignal}
    if name not in signals:
        raise ConfigError(
            "unknown online signal", got=repr(name), allowed=", ".join(map(repr, signals)) + ", or a signal itself",
            fix=did_you_mean(name, signals) or None,
        )  # fmt: skip
    return signals[name]()


def _tapped(signal: object) -> TapSignal | None:
    """What of a signal follows the trainer's own backward pass."""
    return signal.spectra if isinstance(signal, RewardSignal) else signal if isinstance(signal, TapSignal) else None


def _groups(stock: Any) -> Groups:
    """How the trainer's own sampler repeats samples; TRL's `RepeatSampler` says it in these words."""
    if not hasattr(stock, "mini_repeat_count"):
        return NO_REPEATS
    return Groups(stock.mini_repeat_count, stock.batch_size, stock.repeat_count)


def _labels(dataset: Any, ids: Sequence[str], selection: Selection, column: str) -> np.ndarray:
    """[K] the stratum of each sample of the selection, from a column of the data set."""
    if column not in dataset.column_names:
        raise IntegrationError(
            f"the train data set has no column {column!r}", got=", ".join(dataset.column_names),
            fix=did_you_mean(column, dataset.column_names) or None,
        )  # fmt: skip
    label = dict(zip(ids, map(str, dataset[column]), strict=True))
    return np.array([label.get(sample_id, "") for sample_id in selection.ids])


def _problems(trainer: Any, online: object) -> list[SelectorError]:
    """What in the trainer's settings would lose sample identity, or never reach the sampler."""
    args = trainer.args
    follows_rewards = isinstance(online, RewardSignal | FocusSignal)
    strategy = getattr(
        args, "train_sampling_strategy", "group_by_length" if getattr(args, "group_by_length", False) else "random"
    )
    checks = [
        (
            not hasattr(trainer.train_dataset, "__len__"),
            "the train data set is a stream, which no sampler orders", type(trainer.train_dataset).__name__,
            "a datasets.Dataset", "load it without streaming=True",
        ),
        (
            getattr(args, "packing", False),
            "packing joins samples into rows, which then have no id", "packing=True",
            "packing=False", "select before packing: give the trainer selection.apply(dataset), and do not attach",
        ),
        (
            trainer.accelerator.dispatch_batches,
            "only the first process would draw samples", "dispatch_batches=True",
            "dispatch_batches=False", "drop it from accelerator_config",
        ),
        (
            strategy not in ("random", "sequential"),
            "the trainer is told to order samples by length, which attaching would undo", f"train_sampling_strategy={strategy!r}",
            "'random'", "drop it, or do not attach",
        ),
        (
            args.ignore_data_skip and args.resume_from_checkpoint is not None,
            "a resumed epoch would begin anew", "ignore_data_skip=True",
            "ignore_data_skip=False", "drop it: skipping draws no data",
        ),
        (
            follows_rewards and not generates(trainer),
            "the trainer computes no rewards that weights could follow", type(trainer).__name__,
            "GRPOTrainer, RLOOTrainer", "drop online=, or say online='tap'",
        ),
        (
            online is not None and generates(trainer) and args.dataloader_num_workers > 0,
            "workers fetch prompts long before the rewards that should decide about them",
            f"dataloader_num_workers={args.dataloader_num_workers}", "0", None,
        ),
        (
            online is not None and generates(trainer) and args.remove_unused_columns,
            "the ids of the prompts would not reach the rewards", "remove_unused_columns=True", "False", None,
        ),
    ]  # fmt: skip
    problems: list[SelectorError] = [
        IntegrationError(problem, got=got, allowed=allowed, fix=fix)
        for wrong, problem, got, allowed, fix in checks
        if wrong
    ]
    if (tapped := _tapped(online)) is not None and (problem := tap_problem(trainer, tapped)):
        problems.append(problem)
    if isinstance(online, RefreshSignal):
        problems += refresh_problems(trainer)
    return problems
