"""Slow and obvious implementations that the fast ones are held against."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selector.data.samples import Sample


def autograd_gradients(model: nn.Module, sample: Sample, names: list[str]) -> dict[str, Tensor]:
    """Weight gradients of one sample alone: a float64 copy of the model, plain autograd, no batch, no padding.

    Args:
        model: a causal language model.
        sample: what to take the loss of: mean cross-entropy of its loss tokens, over all of its sequences.
        names: modules whose weight gradients are wanted.
    """
    model = copy.deepcopy(model).double().eval()
    losses = []
    for sequence in sample.sequences:
        tokens = torch.tensor(sequence.input_ids[None].astype("int64"))
        logits = model(input_ids=tokens).logits
        mask = torch.tensor(sequence.loss_mask[1:])
        losses.append(F.cross_entropy(logits[0, :-1][mask], tokens[0, 1:][mask], reduction="sum"))
    weights = {name: model.get_submodule(name).weight for name in names}
    loss = torch.stack(losses).sum() / sample.n_loss_tokens
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def dense_measures(gradient: Tensor) -> dict[str, float]:
    """Every stored measure of one weight gradient, by dense float64 SVD."""
    sigma = torch.linalg.svdvals(gradient.double())
    share = sigma[sigma > 0] / sigma.sum()
    return {
        "effective_rank": float(torch.exp(-(share * share.log()).sum())),
        "nuclear_norm": float(sigma.sum()),
        "frobenius_norm": float(sigma.square().sum().sqrt()),
        "spectral_norm": float(sigma.max()),
    }
