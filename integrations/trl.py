"""Train on a selection with any trainer of TRL or transformers: `attach(trainer, selection)` before `trainer.train()`.

The trainer keeps its class and its data set; only its train sampler is replaced, and how often each sample is repeated is
read from the sampler that it would have built, so that GRPO groups stay whole. A callback installs the sampler once more
when training begins: after a resume in the middle of an epoch Accelerate reaches the sampler of a multi-process run only
where `set_sampler` has put it, and the host would otherwise replay epoch 0.

Samples are matched by id, never by position, because trainers drop and shuffle rows while they prepare them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from selector.errors import IntegrationError, SelectorError, did_you_mean, raise_all
from selector.sampling.order import Groups
from selector.sampling.sampler import SelectionSampler
from selector.selection import Selection

T = TypeVar("T", bound=Trainer)

ID_COLUMNS = ("selector_id", "sample_id", "id")
"""Columns that hold sample ids unless the caller names one; the first is what `Selection.apply` adds."""


def attach(trainer: T, selection: Selection, *, id_column: str | None = None, seed: int | None = None) -> T:
    """Make a trainer train on a selection of its data set.

    Args:
        trainer: any trainer of TRL or transformers whose data set has a length; nothing but its train sampler changes.
        selection: the samples to train on; each comes once per epoch, in an order that follows its weights.
        id_column: column of the train data set that holds the sample ids; the first of `ID_COLUMNS` that it has when None.
        seed: of the order; the trainer's `data_seed`, or its `seed`, when None.

    Returns:
        The trainer.

    Raises:
        IntegrationError: the trainer is set up in a way that loses which sample is which; all problems at once.
        SelectionError: its data set has none of the samples, or has one twice.
    """
    raise_all(_problems(trainer))
    args = trainer.args
    stock = trainer._get_train_sampler(trainer.train_dataset)
    sampler = SelectionSampler(
        selection,
        dataset_ids=_dataset_ids(trainer.train_dataset, id_column),
        seed=seed if seed is not None else args.data_seed if args.data_seed is not None else args.seed,
        groups=_groups(stock),
    )
    if sampler.missing:
        warnings.warn(
            f"{len(sampler.missing)} of {len(selection)} selected samples are not in the trainer's data set and will not be "
            f"trained on, {sampler.missing[0]} among them; trainers drop rows whose loss tokens were all cut off",
            stacklevel=2,
        )
    trainer._get_train_sampler = lambda *_, **__: sampler
    trainer.add_callback(_InstallSampler(sampler))
    return trainer


class _InstallSampler(TrainerCallback):
    """Put the sampler where `set_epoch` reaches it through every wrapper of Accelerate."""

    def __init__(self, sampler: SelectionSampler) -> None:
        self._sampler = sampler

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, train_dataloader: DataLoader, **kwargs: Any
    ) -> None:
        train_dataloader.set_sampler(self._sampler)  # pyright: ignore[reportAttributeAccessIssue]  # Accelerate's subclass


def _groups(stock: Any) -> Groups:
    """How the trainer's own sampler repeats samples; TRL's `RepeatSampler` says it in these words."""
    if not hasattr(stock, "mini_repeat_count"):
        return Groups()
    return Groups(stock.mini_repeat_count, stock.batch_size, stock.repeat_count)


def _problems(trainer: Trainer) -> list[SelectorError]:
    """What in the trainer's settings would lose sample identity."""
    problems: list[SelectorError] = []
    args = trainer.args
    if not hasattr(trainer.train_dataset, "__len__"):
        problems.append(
            IntegrationError(
                "the train data set is a stream, which no sampler orders", got=type(trainer.train_dataset).__name__,
                allowed="a datasets.Dataset", fix="load it without streaming=True, or train on selection.apply(dataset)",
            )
        )  # fmt: skip
    if getattr(args, "packing", False):
        problems.append(
            IntegrationError(
                "packing joins samples into rows, which then have no id", got="packing=True", allowed="packing=False",
                fix="select before packing: give the trainer selection.apply(dataset), and do not attach",
            )
        )  # fmt: skip
    if trainer.accelerator.dispatch_batches:
        problems.append(
            IntegrationError(
                "only the first process draws samples", got="dispatch_batches=True", allowed="dispatch_batches=False",
                fix="drop it from accelerator_config",
            )
        )  # fmt: skip
    strategy = getattr(
        args, "train_sampling_strategy", "group_by_length" if getattr(args, "group_by_length", False) else "random"
    )
    if strategy not in ("random", "sequential"):
        problems.append(
            IntegrationError(
                "the trainer is told to order samples by length, and the selection to order them otherwise",
                got=f"train_sampling_strategy={strategy!r}", allowed="'random', which attaching replaces",
            )
        )  # fmt: skip
    return problems


def _dataset_ids(dataset: Any, id_column: str | None) -> Sequence[str]:
    """The sample id of each row."""
    columns: list[str] = dataset.column_names
    if id_column is None:
        id_column = next((name for name in ID_COLUMNS if name in columns), None)
        if id_column is None:
            raise IntegrationError(
                "no column of the train data set holds sample ids", got=", ".join(columns), allowed=", ".join(ID_COLUMNS),
                fix="name the column with id_column=, or give the trainer a data set that has one",
            )  # fmt: skip
    elif id_column not in columns:
        raise IntegrationError(
            f"the train data set has no column {id_column!r}",
            got=", ".join(columns),
            fix=did_you_mean(id_column, columns) or None,
        )
    return [str(value) for value in dataset[id_column]]
