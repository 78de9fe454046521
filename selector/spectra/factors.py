"""Singular values of weight gradients from their factors, in two stages.

The gradient of a linear layer is G = deltaᵀ x. Its singular values need neither G nor an SVD of an O x I matrix:

    T <= min(I, O)   sigma² = eig((x xᵀ)(delta deltaᵀ)), two T x T Gram matrices; the one of x serves all projections that read x
    T >  min(I, O)   sigma² = eig(G Gᵀ) on the smaller side of G

`reduce_factors` keeps only those small matrices, so that hooks can free x and delta at once; `solve` takes the matrices of all
layers and solves those of one size together.

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

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from selector.errors import ConfigError, SelectorError, did_you_mean
from selector.spectra.cores import Core, solve
from selector.spectra.linalg import matmul, outer_square
from selector.spectra.threads import over_batch

Precision = Literal["fast", "high", "reference", "auto"]

ESCALATE = 0.1
"""`auto` solves a matrix again when its floor exceeds this share of ‖G‖_F / sqrt(R)."""


def singular_values(
    x: Float[Tensor, "N T I"], delta: Float[Tensor, "N T O"], precision: Precision = "auto"
) -> Float[Tensor, "N R"]:
    """Singular values of each sample's weight gradient deltaᵀ x, without forming it where that is cheaper.

    Args:
        x: layer inputs, any floating dtype.
        delta: gradients of the sample's loss with respect to the layer's outputs; rows of padding tokens are zero.
        precision: see the module; `auto` follows the dtype of x.

    Returns:
        `[N, R]` float64, descending, R = min(T, I, O), in the unit of the gradient; NaN for samples that are not finite.

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
    check_factors(x, deltas, precision)
    chosen = precision if precision != "auto" else "fast" if x.element_size() < 4 else "high"
    cores = _reduce(x, deltas, chosen)
    if precision != "auto" or chosen != "fast":
        return cores
    return _escalate(cores, x, deltas)


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


def _reduce(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    """The cores of all projections: those with T <= min(I, O), which share the part of x, and those with more tokens."""
    length, width = x.shape[1:]
    short = [i for i, delta in enumerate(deltas) if length <= min(width, delta.shape[-1])]
    long = [i for i in range(len(deltas)) if i not in short]
    cores: dict[int, Core] = {}
    for positions, route in (
        (short, _triangle_cores if precision == "reference" else _gram_cores),
        (long, _gradient_cores),
    ):
        if positions:
            cores |= zip(positions, route(x, [deltas[i] for i in positions], precision), strict=True)
    return [cores[i] for i in range(len(deltas))]


def _gram_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    eps = torch.finfo(_work_dtype(precision)).eps
    x, x_scale = _operand(x, precision)
    operands = [_operand(delta, precision) for delta in deltas]
    rights = [_gram(delta) for delta, _ in operands]
    live = torch.stack([right.diagonal(dim1=-2, dim2=-1) != 0 for right in rights]).any(0)
    # Rows that no projection uses (padding, the last token) may hold anything; they must not even be multiplied by zero.
    left = _gram(x).masked_fill(~(live.unsqueeze(-1) & live.unsqueeze(-2)), 0.0)
    left_ok = _trace(left).isfinite()
    left = left.masked_fill(~left_ok[:, None, None], 0.0)
    cores = []
    for right, (_, scale) in zip(rights, operands, strict=True):
        ok = left_ok & _trace(right).isfinite()
        right = right.masked_fill(~ok[:, None, None], 0.0)
        scale = (x_scale * scale).masked_fill(~ok, torch.nan)
        frobenius = (left * right).double().sum((-2, -1)).clamp_min(0).sqrt() * scale
        # The Frobenius norm of a Gram matrix bounds its largest eigenvalue from above, and closely.
        norms = torch.linalg.matrix_norm(left).double() * torch.linalg.matrix_norm(right).double()
        size = left.shape[-1]
        cores.append(
            Core(
                right, left, True, scale, frobenius, (eps * norms).sqrt() * scale, _work_dtype(precision),
                f"{precision}: {size}x{size} Gram",
            )
        )  # fmt: skip
    return cores


def _triangle_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    """With xᵀ = Q R and deltaᵀ = P S (QR), G = P (S Rᵀ) Qᵀ has the singular values of S Rᵀ."""
    doubles = [delta.double() for delta in deltas]
    lengths = [torch.linalg.vector_norm(delta, dim=-1) for delta in doubles]
    live = torch.stack([length != 0 for length in lengths]).any(0)
    x = x.masked_fill(~live.unsqueeze(-1), 0.0).double()
    x_norm = torch.linalg.matrix_norm(x)
    right = over_batch(_triangle, _finite(x, x_norm).mT).mT
    cores = []
    for delta, length in zip(doubles, lengths, strict=True):
        norm = torch.linalg.vector_norm(length, dim=-1)
        matrix = over_batch(_triangle, _finite(delta, norm).mT) @ right
        scale = torch.where((x_norm * norm).isfinite(), 1.0, torch.nan)
        size = matrix.shape[-1]
        cores.append(
            Core(
                matrix, None, False, scale, torch.linalg.matrix_norm(matrix) * scale,
                torch.finfo(torch.float64).eps * x_norm * norm * scale, torch.float64, f"{precision}: {size}x{size} triangular factors",
            )
        )  # fmt: skip
    return cores


def _triangle(matrices: Tensor) -> Tensor:
    return torch.linalg.qr(matrices, mode="r").R


def _gradient_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    eps = torch.finfo(_work_dtype(precision)).eps
    live = torch.stack([(delta != 0).any(-1) for delta in deltas]).any(0)
    x, x_scale = _operand(x.masked_fill(~live.unsqueeze(-1), 0.0), precision)
    cores = []
    for original in deltas:
        delta, scale = _operand(original, precision)
        gradient = matmul(delta.mT, x) if delta.shape[-1] <= x.shape[-1] else matmul(x.mT, delta)
        frobenius = torch.linalg.matrix_norm(gradient, dtype=torch.float64)
        ok = frobenius.isfinite()
        scale = (x_scale * scale).masked_fill(~ok, torch.nan)
        size, squared = gradient.shape[-2], precision != "reference"
        matrix = (outer_square(gradient) if squared else gradient).masked_fill_(~ok[:, None, None], 0.0)
        cores.append(
            Core(
                matrix, None, squared, scale, frobenius * scale, (eps**0.5 if squared else eps) * frobenius * scale,
                _work_dtype(precision), f"{precision}: {size}x{size} " + ("Gram of G" if squared else "G"),
            )
        )  # fmt: skip
    return cores


def _escalate(cores: list[Core], x: Tensor, deltas: Sequence[Tensor]) -> list[Core]:
    """The cores with those samples added in high whose floor comes near their typical singular value; one wait for the GPU."""
    if not cores:
        return cores
    need = torch.stack([core.floor * core.matrix.shape[-2] ** 0.5 > ESCALATE * core.frobenius for core in cores])
    for i, flags in enumerate(need.tolist()):
        if any(flags):
            samples = torch.tensor([n for n, flag in enumerate(flags) if flag], device=x.device)
            (better,) = _reduce(x[samples], [deltas[i][samples]], "high")
            cores[i] = replace(cores[i], escalated=(samples, better), route=f"{cores[i].route}, {len(samples)} in high")
    return cores


def _work_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fast" else torch.float64


def _operand(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The values in the dtype of the products, and the power of two per sample that keeps float32 squares in range."""
    if precision != "fast":
        return values.double(), values.new_ones(len(values), dtype=torch.float64)
    if values.dtype == torch.float16 or not values.numel():  # the square of a float16 fits a float32
        return values, values.new_ones(len(values), dtype=torch.float64)
    values = values.float() if values.dtype == torch.float64 else values
    norm = torch.linalg.vector_norm(values, dim=(1, 2), dtype=torch.float64)
    exponent = torch.where(norm.isfinite(), torch.frexp(norm).exponent, 0).clamp(-126, 126)
    ones = torch.ones_like(norm)
    return values * torch.ldexp(ones, -exponent).to(values.dtype)[:, None, None], torch.ldexp(ones, exponent)


def _gram(values: Tensor) -> Tensor:
    return matmul(values, values.mT)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _finite(matrices: Tensor, norms: Tensor) -> Tensor:
    """The matrices with those whose norm is not finite replaced by zeros."""
    bad = ~norms.isfinite()
    return matrices.masked_fill(bad[:, None, None], 0.0) if bad.any() else matrices
