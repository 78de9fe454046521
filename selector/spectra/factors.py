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
IN_RANGE = (2.0**-60, 2.0**60)
"""Norms of Gram matrices, of two multiplied, and of gradients, that float32 holds with all that counts; others are solved in high."""


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
    return _escalate(cores, x, deltas, precision) if chosen == "fast" else cores


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
    # All projections go through each step together, and what is one number per sample is reckoned on the host: a model has hundreds
    # of projections, and launches of small kernels would be the whole bill.
    rights = torch.stack([_gram(delta, precision) for delta in deltas])
    live = (rights.diagonal(dim1=-2, dim2=-1) != 0).any(0)
    # Rows that no projection uses (padding, the last token) may hold anything; they must not even be multiplied by zero.
    left = torch.where(live.unsqueeze(-1) & live.unsqueeze(-2), _gram(x, precision), 0.0)
    # The Frobenius norm of a Gram matrix bounds its largest eigenvalue from above, and closely.
    left_norm, right_norm, squares = _to_host(
        torch.linalg.matrix_norm(left),
        torch.linalg.matrix_norm(rights),
        (left * rights).sum((-2, -1), dtype=torch.float64),
    )
    size = left_norm * right_norm
    left_ok = _in_range(left_norm, precision)
    ok = left_ok & _in_range(right_norm, precision) & _in_range(size, precision)
    if not ok.all():
        rights[(~ok).to(x.device)] = 0.0
        left[(~left_ok).to(x.device)] = 0.0
    scale, eps = _power_of_two(size.sqrt(), ok), torch.finfo(_work_dtype(precision)).eps
    frobenius, floor = (n.clamp_min(0).sqrt().masked_fill(~ok, torch.nan) for n in (squares, eps * size))
    route = f"{precision}: {left.shape[-1]}x{left.shape[-1]} Gram"
    return [
        Core(rights[i], left, True, scale[i], frobenius[i], floor[i], _work_dtype(precision), route)
        for i in range(len(deltas))
    ]


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
        size, frobenius = _to_host(x_norm * norm, torch.linalg.matrix_norm(matrix))
        scale = torch.ones_like(size).masked_fill(~size.isfinite(), torch.nan)
        floor = torch.finfo(torch.float64).eps * size * scale
        route = f"{precision}: {matrix.shape[-1]}x{matrix.shape[-1]} triangular factors"
        cores.append(Core(matrix, None, False, scale, frobenius * scale, floor, torch.float64, route))
    return cores


def _triangle(matrices: Tensor) -> Tensor:
    return torch.linalg.qr(matrices, mode="r").R


def _gradient_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    eps = torch.finfo(_work_dtype(precision)).eps
    live = torch.stack([(delta != 0).any(-1) for delta in deltas]).any(0)
    x = _operand(x.masked_fill(~live.unsqueeze(-1), 0.0), precision)
    cores = []
    for original in deltas:
        delta = _operand(original, precision)
        gradient = matmul(delta.mT, x) if delta.shape[-1] <= x.shape[-1] else matmul(x.mT, delta)
        (norm,) = _to_host(torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=torch.float64))
        ok = _in_range(norm, precision)
        if not ok.all():
            gradient[(~ok).to(x.device)] = 0.0
        size, squared = gradient.shape[-2], precision != "reference"
        scale = _power_of_two(norm, ok) if squared else torch.ones_like(norm).masked_fill(~ok, torch.nan)
        frobenius = norm.masked_fill(~ok, torch.nan)
        floor = (eps**0.5 if squared else eps) * frobenius
        route = f"{precision}: {size}x{size} " + ("Gram of G" if squared else "G")
        matrix = outer_square(gradient) if squared else gradient
        cores.append(Core(matrix, None, squared, scale, frobenius, floor, _work_dtype(precision), route))
    return cores


def _escalate(cores: list[Core], x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    """The cores of fast with those samples added in high that float32 cannot hold.

    These are samples out of its range, zero ones among them, and for `auto` those whose floor comes near their typical singular value.
    """
    if not cores:
        return cores
    need = torch.stack([core.scale for core in cores]).isnan()
    if precision == "auto":
        need |= torch.stack([core.floor * core.matrix.shape[-2] ** 0.5 > ESCALATE * core.frobenius for core in cores])
    for i, flags in enumerate(need.tolist()):
        if any(flags):
            samples = torch.tensor([n for n, flag in enumerate(flags) if flag], device=x.device)
            (better,) = _reduce(x[samples], [deltas[i][samples]], "high")
            cores[i] = replace(cores[i], escalated=(samples, better), route=f"{cores[i].route}, {len(samples)} in high")
    return cores


def _work_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fast" else torch.float64


def _operand(values: Tensor, precision: str) -> Tensor:
    """The values in a dtype whose products `precision` allows: 16 bits stay as they are in fast."""
    if precision != "fast":
        return values.double()
    return values.float() if values.element_size() == 8 else values


def _gram(values: Tensor, precision: str) -> Tensor:
    operand = _operand(values, precision)
    return matmul(operand, operand.mT)


def _to_host(*numbers: Tensor) -> list[Tensor]:
    """Tensors on the CPU in float64, in one transfer."""
    joined = torch.cat([tensor.flatten().double() for tensor in numbers]).cpu()
    parts = joined.split([tensor.numel() for tensor in numbers])
    return [part.view(tensor.shape) for part, tensor in zip(parts, numbers, strict=True)]


def _in_range(size: Tensor, precision: str) -> Tensor:
    low, high = IN_RANGE if precision == "fast" else (0.0, torch.finfo(torch.float64).max)
    return (size >= low) & (size <= high)


def _power_of_two(size: Tensor, ok: Tensor) -> Tensor:
    """The power of two next above a size, by which numbers are divided without rounding; 1 for zeros, NaN where not ok."""
    power = torch.where(size > 0, size / torch.frexp(size).mantissa, 1.0)
    return power.masked_fill(~ok, torch.nan)


def _finite(matrices: Tensor, norms: Tensor) -> Tensor:
    """The matrices with those whose norm is not finite replaced by zeros."""
    bad = ~norms.isfinite()
    return matrices.masked_fill(bad[:, None, None], 0.0) if bad.any() else matrices
