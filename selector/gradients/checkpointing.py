"""Recompute activations in the backward pass, layer by layer, so that long samples fit.

The models' own switch works in training mode only, where dropout is on. Here each decoder layer's `forward` is wrapped
instead, which leaves the model in evaluation mode and works for any model whose layers can be named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from selector.types import LayerSpec

TO_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What decoder layers of transformers call the cache: `cache` since 5.24."""


def decoder_layers(model: nn.Module, specs: Sequence[LayerSpec]) -> list[nn.Module]:
    """The decoder layers that hold measured matrices, in order.

    Args:
        model: the model that the specs belong to.
        specs: the layer table.
    """
    names = dict.fromkeys(match[0] for spec in specs if (match := TO_LAYER.match(spec.name)))
    return [model.get_submodule(name) for name in names]


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Forget the activations inside each layer after the forward pass and compute them again in the backward pass.

    Args:
        layers: modules without dropout in effect, none inside another.
    """
    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(_checkpointed, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # a cache would take the keys and values in twice
    kwargs |= {name: None for name in CACHES if name in kwargs}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def is_recomputed(ancestors: Sequence[nn.Module]) -> bool:
    """Whether a module lies where the model itself recomputes activations, as trainers make it do.

    Args:
        ancestors: the modules that hold it, nearest first.
    """
    for module in ancestors:
        if type(module).__name__ == "CheckpointWrapper":
            return True
        if hasattr(module, "gradient_checkpointing"):
            return bool(module.gradient_checkpointing and module.training)
    return False
