"""Inner products and cosines of gradients, from factors: no gradient is formed.

With G = deltaᵀ x, the inner product of two gradients is the sum over pairs of tokens of (x_s · x_t)(delta_s · delta_t). That costs
T² (I + O) operations instead of the T I O of forming one gradient, and T² numbers of memory instead of I O.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.errors import SelectorError


def inner_products(
    x: Float[Tensor, "N T I"],
    delta: Float[Tensor, "N T O"],
    other_x: Float[Tensor, "N S J"],
    other_delta: Float[Tensor, "N S P"],
) -> Float[Tensor, " N"]:
    """Inner product of two gradients of each sample, such as those of two layers of one shape.

    Args:
        x: inputs of the first layer.
        delta: output gradients of the first layer.
        other_x: inputs of the second layer.
        other_delta: output gradients of the second layer.

    Returns:
        ⟨G, G'⟩ per sample, float64.

    Raises:
        SelectorError: the two gradients differ in shape.
    """
    if x.shape[-1] != other_x.shape[-1] or delta.shape[-1] != other_delta.shape[-1]:
        raise SelectorError(
            "gradients of different shapes have no inner product",
            got=f"{delta.shape[-1]}x{x.shape[-1]} and {other_delta.shape[-1]}x{other_x.shape[-1]}",
            allowed="two gradients of one shape",
        )
    tokens = x.double() @ other_x.double().mT
    return (tokens * (delta.double() @ other_delta.double().mT)).sum((-2, -1))


def pairwise_inner_products(
    x: Float[Tensor, "N T I"],
    delta: Float[Tensor, "N T O"],
    other_x: Float[Tensor, "M S I"] | None = None,
    other_delta: Float[Tensor, "M S O"] | None = None,
) -> Float[Tensor, "N M"]:
    """Inner products of the gradients of every sample with those of every other, for one layer and projection.

    Args:
        x: inputs of the layer.
        delta: output gradients of the layer.
        other_x: inputs for the second set of samples; the first set when None.
        other_delta: output gradients for the second set; the first set when None.

    Returns:
        ⟨G_n, G_m⟩, float64.
    """
    other_x = x if other_x is None else other_x
    other_delta = delta if other_delta is None else other_delta
    rows = [
        inner_products(x[n].expand(len(other_x), -1, -1), delta[n].expand(len(other_x), -1, -1), other_x, other_delta)
        for n in range(len(x))
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, len(other_x), dtype=torch.float64)


def cosines(
    x: Float[Tensor, "N T I"],
    delta: Float[Tensor, "N T O"],
    other_x: Float[Tensor, "N S J"],
    other_delta: Float[Tensor, "N S P"],
) -> Float[Tensor, " N"]:
    """Cosine of the flattened gradients of two layers of one shape, per sample.

    Args:
        x: inputs of the first layer.
        delta: output gradients of the first layer.
        other_x: inputs of the second layer.
        other_delta: output gradients of the second layer.

    Returns:
        −1 … 1, float64; NaN where a gradient is zero.

    Raises:
        SelectorError: the two gradients differ in shape.
    """
    norms = inner_products(x, delta, x, delta) * inner_products(other_x, other_delta, other_x, other_delta)
    return inner_products(x, delta, other_x, other_delta) / norms.clamp_min(0).sqrt()
