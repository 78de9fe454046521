"""Which attention keeps apart sequences that are joined without padding: known by its function, and tried before a run.

Joined sequences lie in one row, and positions that begin anew are all that tells the model where. Attention with a mask
needs a model that makes its mask from the positions, which not every one does; flash attention takes their borders from
the positions itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from selector.batching import join
from selector.data.samples import Sample, TokenSequence
from selector.errors import ModelError, SelectorError
from selector.gradients.capture import gradients_of_activations_only
from selector.scorer.checks import tolerance_of

PACKAGES = {"flash_attention_2": ("flash_attn", "flash-attn"), "flash_attention_3": ("flash_attn_interface", "flash-attn-3")}  # fmt: skip
"""Module that an implementation needs, and the package that has it. Without it transformers would fetch a kernel from the hub."""

KNOWN = ("transformers.integrations.sdpa_attention", "transformers.integrations.flash_attention")
"""Where the attention functions lie that have been tried with joined sequences; `eager` is each model's own."""

ALLOWED = "eager, sdpa, flash_attention_2 or flash_attention_3, in a model that tells sequences by their positions"
TRIED_LENGTHS = (16, 8)
"""Tokens of the two sequences that are joined to see whether the second one sees the first."""


def missing_attention(name: str) -> list[SelectorError]:
    """Why an attention implementation cannot be had here.

    Args:
        name: as transformers calls it, or `auto`.
    """
    module, package = PACKAGES.get(name, (None, None))
    if module is None or find_spec(module) is not None:
        return []
    return [
        ModelError(f"{name} is not installed", got=f"no module {module}", allowed="auto, eager, sdpa, and what is installed",
                   fix=f"install {package} for this version of torch and CUDA, or leave out --attention")
    ]  # fmt: skip


def joining_problems(model: nn.Module, sharded: bool = False) -> list[SelectorError]:
    """Why sequences that are joined without padding would see each other in a model.

    Args:
        model: a causal language model.
        sharded: whether it is or will be sharded; then it is not run, and the self-test of the run has the last word.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config
    name = getattr(config.get_text_config(), "_attn_implementation", None)
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)  # releases differ in whether a kernel is bound to it
    fix = "leave out --padding-free, or load the model with --attention sdpa"
    if name != "eager" and getattr(function, "__module__", None) not in KNOWN:
        return [ModelError("--padding-free with an attention that is not known to keep sequences apart", got=name, allowed=ALLOWED, fix=fix)]  # fmt: skip
    if sharded:
        return []
    try:
        difference = _influence_of_a_neighbour(model)
    except Exception as error:  # kernels raise many kinds, such as for a number format that they do not have
        return [ModelError(f"the model cannot run with {name} and --padding-free", got=error, allowed=ALLOWED, fix=fix)]
    tolerance = tolerance_of(next(model.parameters()).dtype)
    if difference <= tolerance:
        return []
    return [
        ModelError(f"{type(model).__name__} with {name} does not keep apart sequences that are joined without padding",
                   got=f"logits differ by {difference:.2g} of their norm between a sequence alone and behind another",
                   allowed=f"{tolerance:g}", fix="leave out --padding-free")
    ]  # fmt: skip


def _influence_of_a_neighbour(model: nn.Module) -> float:
    """How far the logits of a sequence move when it is joined to another one, relative to their norm."""
    generator = np.random.default_rng(0)
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    samples = []
    for i, length in enumerate(TRIED_LENGTHS):
        tokens = generator.integers(0, embeddings.weight.shape[0], length).astype(np.int32)
        samples.append(Sample(str(i), i, None, (TokenSequence(tokens, np.arange(length) > 0),)))
    device = next(model.parameters()).device
    with torch.no_grad(), gradients_of_activations_only(model):
        together = model(**join(samples, device).inputs, use_cache=False).logits[0, TRIED_LENGTHS[0] :].float()
        alone = model(**join(samples[1:], device).inputs, use_cache=False).logits[0].float()
    return float((together - alone).norm() / alone.norm())
