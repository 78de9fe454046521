"""Singular values of weight gradients from their factors, in two stages.

The gradient of a linear layer is G = deltaᵀ x. Its singular values need neither G nor an SVD of an O x I matrix:

    T <= min(I, O)   sigma² = eig((x xᵀ)(delta deltaᵀ)), two T x T Gram matrices; the one of x serves all projections that read x
    T >  min(I, O)   sigma² = eig(G Gᵀ) on the smaller side of G

`reduce_factors` keeps only those small matrices, so that hooks can free x and delta at once; `solve` takes the matrices of all
layers and solves those of one size together. What a GPU computes for a layer is launched at once, but the few numbers that decide
how it goes on are read later where the caller can wait with them (`begin_reduction`), so that the GPU need not wait for the host.

Squaring costs half the digits. What lies below the floor of a route is noise:

    fast        products and eigenvalues in float32, in which operands of 16 bits are exact; factors in float64
                sqrt(eps32) ‖x‖ ‖delta‖, about 3e-4 of that product; where so many values lie at the noise of the eigen-solver that
                their sum would show (few directions, many tokens), eigenvalues in float64, which leaves the noise of the products
    high        float64 throughout
                sqrt(eps64) ‖x‖ ‖delta‖, about 1.5e-8 of it
    reference   float64, nothing squared
                eps64 ‖x‖ ‖delta‖

where ‖x‖ and ‖delta‖ are spectral norms, and ‖G‖ stands in place of the product for T > min(I, O). The product is near ‖G‖ on ordinary
data, but not where the tokens of x share a large common part that delta cancels. `auto` is fast for 16-bit factors and high for
others, and solves a sample's matrix again in high where the floor comes near its typical singular value, ‖G‖_F / sqrt(R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selector.errors import ConfigError, SelectorError, did_you_mean
from selector.spectra.cores import Core, solve
from selector.spectra.routes import cores_of

Precision = Literal["fast", "high", "reference", "auto"]

ESCALATE = 0.1
"""`auto` solves a matrix again when its floor exceeds this share of ‖G‖_F / sqrt(R)."""
OVERWRITTEN = 1e-2, 100.0
"""How far ‖G‖² of two reductions of the same factors may differ: a share of it, and multiples of the squared floor, of which
rounding alone made a fifth."""


def singular_values(
    x: Float[Tensor, "N T I"], delta: Float[Tensor, "N T O"], precision: Precision = "auto"
) -> Float[Tensor, "N R"]:
    """Singular values of each sample's weight gradient deltaᵀ x, without forming it where that is cheaper.

    Args:
        x: layer inputs, any floating dtype.
        delta: gradients of the sample's loss with respect to the layer's outputs; rows of padding tokens are zero.
        precision: see the module; `auto` follows the dtype of x.

    Returns:
        `[N, R]` float64, descending, R = min(T, I, O), in the unit of the gradient; NaN for samples that are not finite. Without
        a graph, whatever the factors require.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    return solve(reduce_factors(x, [delta], precision))[0]


def reduce_factors(
    x: Float[Tensor, "N T I"], deltas: Sequence[Float[Tensor, "N T _"]], precision: Precision = "auto"
) -> list[Core]:
    """Reduce the factors of a layer to the small matrices that `solve` needs; x and deltas can be freed afterwards.

    Args:
        x: inputs that all projections read, any floating dtype.
        deltas: output gradients, one per projection; rows of padding tokens are zero.
        precision: see the module; `auto` follows the dtype of x.

    Returns:
        One core per projection.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    return begin_reduction(x, deltas, precision)()


def begin_reduction(
    x: Float[Tensor, "N T I"], deltas: Sequence[Float[Tensor, "N T _"]], precision: Precision = "auto"
) -> Callable[[], list[Core]]:
    """Launch what `reduce_factors` does on the device, and leave to a call of the result what waits for it.

    Until that call x and deltas must stay as they are, since some samples may have to be reduced again.

    Args:
        x: as for `reduce_factors`.
        deltas: as for `reduce_factors`.
        precision: as for `reduce_factors`.

    Returns:
        To be called once; returns one core per projection. It raises SelectorError where it needs factors that were overwritten.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    check_factors(x, deltas, precision)
    x, deltas = x.detach(), [delta.detach() for delta in deltas]  # solvers keep no graph; versions are counted together
    chosen = precision if precision != "auto" else "fast" if x.element_size() < 4 else "high"
    finish = cores_of(x, deltas, chosen)
    if chosen != "fast":
        return finish
    factors = _Factors(x, deltas)
    return lambda: _escalate(finish(), factors, precision)


def check_factors(x: Tensor, deltas: Sequence[Tensor], precision: str) -> None:
    """Refuse a precision that is not known and factors that do not fit each other.

    Args:
        x: inputs.
        deltas: output gradients.
        precision: what the user asked for.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    if precision not in get_args(Precision):
        raise ConfigError(
            "unknown precision", got=repr(precision), allowed=", ".join(get_args(Precision)),
            fix=did_you_mean(precision, get_args(Precision)) or None,
        )  # fmt: skip
    for delta in deltas:
        if x.ndim != 3 or delta.ndim != 3 or x.shape[:2] != delta.shape[:2]:
            raise SelectorError(
                "the factors of a gradient do not fit each other",
                got=f"x {list(x.shape)} and delta {list(delta.shape)}",
                allowed="x [N, T, I] and delta [N, T, O]",
            )


class _Factors:
    """Factors that are kept for a second reduction, and what tells that they were changed in the meantime."""

    def __init__(self, x: Tensor, deltas: Sequence[Tensor]) -> None:
        self.x, self.deltas = x, deltas
        self._versions = self._count()

    def _count(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in (self.x, *self.deltas)]

    def reduce_in_high(self, projection: int, samples: Tensor, core: Core) -> Core:
        """The core of some samples of a projection in high.

        Args:
            projection: which one.
            samples: positions of the samples.
            core: what fast has made of all of them.
        """
        (better,) = cores_of(self.x[samples], [self.deltas[projection][samples]], "high")()
        # A kernel that writes past torch leaves the counts alone, but not the norms.
        chosen = samples.to(core.floor.device)
        before, after = core.frobenius[chosen].square(), better.frobenius.square()
        moved = (after - before).abs() > OVERWRITTEN[0] * after + OVERWRITTEN[1] * core.floor[chosen].square()
        if self._count() != self._versions or moved.any():
            raise SelectorError(
                "a layer's inputs or output gradients were overwritten before they could be measured",
                allowed="operations that leave them alone", fix="switch off what works in place, or measure in high",
            )  # fmt: skip
        return better


def _escalate(cores: list[Core], factors: _Factors, precision: str) -> list[Core]:
    """The cores of fast with those samples added in high that float32 cannot hold.

    These are samples out of its range, zero ones among them, and for `auto` those whose floor comes near their typical singular value.
    """
    for i, core in enumerate(cores):
        need = np.isnan(core.scale.numpy())
        if precision == "auto":
            share = ESCALATE / core.matrix.shape[-2] ** 0.5 if core.matrix.numel() else 0.0
            need |= core.floor.numpy() > share * core.frobenius.numpy()
        if need.any():
            samples = torch.from_numpy(need.nonzero()[0]).to(factors.x.device)
            better = factors.reduce_in_high(i, samples, cores[i])
            cores[i] = replace(cores[i], escalated=(samples, better), route=f"{cores[i].route}, {len(samples)} in high")
    return cores
