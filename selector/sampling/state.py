"""The state of a sampler in a checkpoint: one safetensors file with its arrays, and in the header what they belong to.

A state is taken up only by a sampler of the same identity (samples, weights, seed, curriculum, strata, groups, signal and its settings).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from selector.errors import SelectionError
from selector.sampling.sampler import SelectionSampler
from selector.store.writer import write_atomically

FORMAT = "selector-sampler"
FORMAT_VERSION = 1
FILE = "selector_sampler.safetensors"
"""Name of the file inside a checkpoint."""


def save_state(sampler: SelectionSampler, folder: Path) -> None:
    """Write the state of a sampler into a checkpoint folder.

    Args:
        sampler: at the end of a training step.
        folder: the checkpoint, which exists.
    """
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": sampler.identity}
    write_atomically(folder / FILE, save(sampler.state_dict(), metadata={"selector": json.dumps(header)}))


def load_state(sampler: SelectionSampler, folder: Path) -> bool:
    """Let a sampler continue from a checkpoint.

    Args:
        sampler: newly made, with the settings of the interrupted run.
        folder: the checkpoint.

    Returns:
        Whether the checkpoint holds a state.

    Raises:
        SelectionError: the state is damaged, of another format version, or of a sampler with other settings.
    """
    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["selector"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        found, identity = (header["format"], header["format_version"]), header["identity"]
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise SelectionError(
            f"{path} is no sampler state", got=repr(error), fix="resume from another checkpoint"
        ) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise SelectionError(f"{path} has another format", got=found, allowed=(FORMAT, FORMAT_VERSION))
    differing = [name for name in identity | sampler.identity if identity.get(name) != sampler.identity.get(name)]
    if differing:
        raise SelectionError(
            "the checkpoint belongs to another order of samples",
            got=", ".join(f"{name} = {sampler.identity.get(name)}" for name in differing),
            allowed=", ".join(f"{name} = {identity.get(name)}" for name in differing),
            fix="resume with the selection and settings of the interrupted run, or start a new one",
        )  # fmt: skip
    sampler.load_state_dict(state)
    return True
