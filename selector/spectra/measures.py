"""Numbers that summarise a spectrum: how much gradient there is, and over how many directions it spreads.

Every measure maps singular values `[*N, R]` to one float64 per sample, `[*N]`. A zero spectrum has norms of 0.0 and no rank:
its effective and stable rank are NaN, which the caller turns into a status. A NaN in a spectrum makes all its measures NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from selector.registry import Registry

Measure = Callable[[Float[Tensor, "*N R"]], Float[Tensor, "*N"]]
"""The frozen signature of a measure: singular values (any order, >= 0) to one float64 per sample."""

measures: Registry[Measure] = Registry("measure")
"""Measures by name; `measures.register("name")` adds one."""


@measures.register("effective_rank")
def effective_rank(sigma: Float[Tensor, "*N R"]) -> Float[Tensor, "*N"]:
    """Exponential of the entropy of the normalised singular values.

    Args:
        sigma: singular values, not squared.

    Returns:
        A count between 1 and R; NaN for a zero spectrum.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    sigma = sigma.double()
    total = sigma.sum(-1)
    share = sigma / total.unsqueeze(-1)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return entropy.exp().masked_fill(total == 0, torch.nan)


@measures.register("nuclear_norm")
def nuclear_norm(sigma: Float[Tensor, "*N R"]) -> Float[Tensor, "*N"]:
    """Sum of the singular values.

    Args:
        sigma: singular values.

    Returns:
        The norm, in the unit of the gradient.
    """
    return sigma.double().sum(-1)


@measures.register("frobenius_norm")
def frobenius_norm(sigma: Float[Tensor, "*N R"]) -> Float[Tensor, "*N"]:
    """Root of the sum of the squared singular values: the Euclidean norm of the gradient's entries.

    Args:
        sigma: singular values.

    Returns:
        The norm, in the unit of the gradient.
    """
    return torch.linalg.vector_norm(sigma.double(), dim=-1)


@measures.register("spectral_norm")
def spectral_norm(sigma: Float[Tensor, "*N R"]) -> Float[Tensor, "*N"]:
    """Largest singular value.

    Args:
        sigma: singular values.

    Returns:
        The norm, in the unit of the gradient.
    """
    sigma = sigma.double()
    return sigma.amax(-1) if sigma.shape[-1] else sigma.sum(-1)


@measures.register("stable_rank")
def stable_rank(sigma: Float[Tensor, "*N R"]) -> Float[Tensor, "*N"]:
    """Squared Frobenius norm over squared spectral norm.

    Args:
        sigma: singular values.

    Returns:
        A count between 1 and R; NaN for a zero spectrum.

    Source:
        Rudelson and Vershynin 2007, "Sampling from large matrices".
    """
    largest = spectral_norm(sigma)
    return (sigma.double() / largest.unsqueeze(-1)).square().sum(-1).masked_fill(largest == 0, torch.nan)
