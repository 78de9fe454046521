"""Exact resume of trainers that serve several steps from one generation (GRPO, RLOO and their kin).

TRL keeps the completions of a generation in memory for `steps_per_generation * num_iterations` steps and counts steps from
zero after a resume. A run resumed inside such a cycle would therefore generate again, from a newer policy, and at shifted
steps ever after. Here the step counter is put right, and the completions travel in the checkpoint, a file per rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def keeps_rollouts(trainer: Any) -> bool:
    """Whether a trainer generates for several steps at a time."""
    return hasattr(trainer, "_buffered_inputs") and hasattr(trainer, "_step")


def save_rollouts(trainer: Any, folder: Path, cycle: int) -> None:
    """Write the completions that later steps of this cycle need, if the cycle is not over.

    Args:
        trainer: at the end of a step.
        folder: the checkpoint.
        cycle: steps that one generation serves.
    """
    parts = trainer._buffered_inputs
    if parts is None or trainer._step % cycle == 0:
        return
    values = {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items() if value is not None}
    if all(
        isinstance(value, torch.Tensor) for value in values.values()
    ):  # image inputs are lists: these are generated again
        save_file({name: value.detach().cpu().clone() for name, value in values.items()}, _path(trainer, folder))


def restore_rollouts(trainer: Any, folder: Path, cycle: int, step: int) -> bool:
    """Put the step counter right, and the completions back that the checkpoint holds.

    Args:
        trainer: about to continue training.
        folder: the checkpoint.
        cycle: steps that one generation serves.
        step: forward steps before the checkpoint, over all epochs.

    Returns:
        Whether the next step will generate completions that the interrupted run had generated already.
    """
    trainer._step = step
    if step % cycle == 0:
        return False
    path = _path(trainer, folder)
    if not path.exists():
        return True
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        i, name = key.split(".", 1)
        parts.setdefault(int(i), {})[name] = value.to(trainer.accelerator.device)
    trainer._buffered_inputs = [parts[i] for i in sorted(parts)]
    return False


def _path(trainer: Any, folder: Path) -> Path:
    return folder / f"selector_rollouts_{trainer.accelerator.process_index}.safetensors"
