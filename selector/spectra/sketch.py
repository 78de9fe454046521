"""Fixed-size sketches of gradients whose inner products are, on average, those of the gradients.

A gradient G = deltaᵀ x is projected on both sides: S = A G Bᵀ with random A [k, O] and B [k, I] of variance 1/k, so that
E⟨S, S'⟩ = ⟨G, G'⟩. It is computed as (delta Aᵀ)ᵀ (x Bᵀ), which forms no gradient. One side each keeps A and B small (k (I + O) numbers;
a projection of the flattened gradient would hold k² I O), at the price of a somewhat larger variance.
The projections follow from the seed and the layer's name alone: every rank, run and machine draws the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from selector.errors import ConfigError

Distribution = Literal["rademacher", "gaussian"]
Normalization = Literal["unit", "clip", "none"]


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How gradients are sketched.

    Raises:
        ConfigError: a setting is out of range.
    """

    dimension: int = 256
    """Numbers kept per layer and projection; a square, since both sides are projected to its root."""
    distribution: Distribution = "rademacher"
    """Entries of the projections: signs, or normal numbers."""
    normalization: Normalization = "unit"
    """Per layer, before layers are joined: `unit` gives every layer the same say, `clip` bounds long ones, `none` keeps lengths."""
    clip_at: float = 1.0
    """Longest sketch that `clip` leaves as it is, in the unit of the gradient."""
    seed: int = 0
    """Seed of the projections."""

    def __post_init__(self) -> None:
        if self.dimension < 1 or math.isqrt(self.dimension) ** 2 != self.dimension:
            raise ConfigError(
                "the dimension of a sketch must be a square",
                got=self.dimension,
                allowed="1, 4, ..., 64, 256, 1024, ...",
            )
        if self.distribution not in ("rademacher", "gaussian"):
            raise ConfigError(
                "unknown distribution of a sketch", got=repr(self.distribution), allowed="rademacher, gaussian"
            )
        if self.normalization not in ("unit", "clip", "none"):
            raise ConfigError(
                "unknown normalization of a sketch", got=repr(self.normalization), allowed="unit, clip, none"
            )
        if not self.clip_at > 0:
            raise ConfigError("the clipping length of a sketch must be positive", got=self.clip_at, allowed="> 0")


def sketch(
    x: Float[Tensor, "N T I"], delta: Float[Tensor, "N T O"], name: str, config: SketchConfig
) -> Float[Tensor, "N _"]:
    """Project the gradient of each sample to a fixed number of dimensions.

    Args:
        x: inputs of the layer, any floating dtype.
        delta: output gradients of the projection; rows of padding tokens are zero.
        name: name of the layer and projection, which seeds its random projections.
        config: dimension, distribution and seed.

    Returns:
        `[N, config.dimension]` float32, not yet normalised.
    """
    side = math.isqrt(config.dimension)
    left = _projection(f"{name}/out", delta.shape[-1], side, config.distribution, config.seed, delta.device)
    right = _projection(f"{name}/in", x.shape[-1], side, config.distribution, config.seed, x.device)
    padding = (delta == 0).all(-1, keepdim=True)
    return ((delta.float() @ left).mT @ (x.float() @ right).masked_fill(padding, 0.0)).flatten(1)


def join(sketches: Sequence[Float[Tensor, "N _"]], config: SketchConfig) -> Float[Tensor, "N D"]:
    """Normalise the sketches of all layers and put them side by side.

    Args:
        sketches: one per layer and projection, in the order to keep.
        config: the normalization.

    Returns:
        `[N, D]` float32, D the sum of the dimensions; a zero sketch stays zero.
    """
    return torch.cat([_normalize(s, config) for s in sketches], dim=-1)


def _normalize(values: Tensor, config: SketchConfig) -> Tensor:
    if config.normalization == "none":
        return values
    length = torch.linalg.vector_norm(values.double(), dim=-1, keepdim=True)
    limit = length if config.normalization == "unit" else (length / config.clip_at).clamp_min(1.0)
    return (values.double() / limit.masked_fill(limit == 0, 1.0)).to(values.dtype)


@lru_cache(maxsize=1024)
def _projection(name: str, size: int, side: int, distribution: Distribution, seed: int, device: torch.device) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{distribution}/{name}/{size}/{side}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if distribution == "gaussian":
        entries = torch.randn(size, side, generator=generator)
    else:
        entries = torch.randint(0, 2, (size, side), generator=generator).float() * 2 - 1
    return (entries / math.sqrt(side)).to(device)
