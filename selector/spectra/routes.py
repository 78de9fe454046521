"""The routes by which factors of gradients become small matrices.

Each launches everything on the device and returns a function that waits for the numbers of the samples, one transfer for all of
a layer's projections, and makes cores of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selector.spectra.cores import Core
from selector.spectra.linalg import matmul, outer_square, uses_kernels
from selector.spectra.threads import over_batch

IN_RANGE = (2.0**-60, 2.0**60)
"""Norms of Gram matrices, of two multiplied, and of gradients, that float32 holds with all that counts; others are solved in high."""


def cores_of(
    x: Float[Tensor, "N T I"], deltas: Sequence[Float[Tensor, "N T _"]], precision: str
) -> Callable[[], list[Core]]:
    """Launch the reduction of all projections of a layer: those with T <= min(I, O), which share the part of x, and those with more tokens.

    Args:
        x: inputs that all projections read.
        deltas: output gradients, one per projection.
        precision: `fast`, `high` or `reference`.

    Returns:
        To be called once, for one core per projection; this waits for the numbers that the device sends.
    """
    length, width = x.shape[1:]
    short = [i for i, delta in enumerate(deltas) if length <= min(width, delta.shape[-1])]
    long = [i for i in range(len(deltas)) if i not in short]
    routes = ((short, _triangle_cores if precision == "reference" else _gram_cores), (long, _gradient_cores))
    begun = [(which, route(x, [deltas[i] for i in which], precision)) for which, route in routes if which]
    count = len(deltas)

    def finish() -> list[Core]:
        cores: dict[int, Core] = {}
        for which, later in begun:
            cores |= zip(which, later(), strict=True)
        return [cores[i] for i in range(count)]

    return finish


def _gram_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> Callable[[], list[Core]]:
    # All projections go through each step together, and what is one number per sample is reckoned on the host: a model has hundreds
    # of projections, and launches of small kernels would be the whole bill.
    grams = [_gram(delta, precision) for delta in deltas]
    rights = torch.stack(grams) if len(grams) > 1 else grams[0].unsqueeze(0)
    left = _gram(x, precision)
    arriving = _to_host(_mask(left, rights))
    eps = torch.finfo(_work_dtype(precision)).eps

    @np.errstate(all="ignore")  # what is not finite ends as NaN, where it should
    def finish() -> list[Core]:
        (squares,) = arriving()
        # The Frobenius norm of a Gram matrix bounds its largest eigenvalue from above, and closely.
        left_norm, right_norm = np.sqrt(squares[:, 0, 0]), np.sqrt(squares[:, :, 1])
        size = left_norm[:, None] * right_norm
        left_ok = _in_range(left_norm, precision)
        ok = left_ok[:, None] & _in_range(right_norm, precision) & _in_range(size, precision)
        if not ok.all():
            rights[torch.from_numpy(~ok.T).to(rights.device)] = 0.0
            left[torch.from_numpy(~left_ok).to(left.device)] = 0.0
        numbers = (_power_of_two(np.sqrt(size), ok), np.sqrt(squares[:, :, 2].clip(min=0)), np.sqrt(eps * size))
        route = f"{precision}: {left.shape[-1]}x{left.shape[-1]} Gram"
        per_projection = (torch.from_numpy(np.where(ok, number, np.nan).T).unbind() for number in numbers)
        return [
            Core(right, left, True, scale, frobenius, floor, _work_dtype(precision), route)
            for right, scale, frobenius, floor in zip(rights.unbind(), *per_projection, strict=True)
        ]

    return finish


def _mask(left: Float[Tensor, "N n n"], rights: Float[Tensor, "P N n n"]) -> Float[Tensor, "N P 3"]:
    """Clear the rows and columns of `left` that no projection uses, and sum the squares of each matrix and their products with it.

    Rows that no projection uses (padding, the last token) may hold anything; they must not even be multiplied by zero.

    Returns:
        Squares of the left matrix, of the right one, and products of the two, float64.
    """
    if uses_kernels(left):
        from selector.spectra.gram_kernels import mask_and_sum

        return mask_and_sum(left, rights)
    dead = (rights.diagonal(dim1=-2, dim2=-1) == 0).all(0)
    left.masked_fill_(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    sums = [(a * b).sum((-2, -1), dtype=torch.float64) for a, b in ((left, left), (rights, rights), (left, rights))]
    return torch.stack([each.expand(rights.shape[:2]).T for each in sums], dim=-1)


def _triangle_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> Callable[[], list[Core]]:
    """With xᵀ = Q R and deltaᵀ = P S (QR), G = P (S Rᵀ) Qᵀ has the singular values of S Rᵀ."""
    doubles = [delta.double() for delta in deltas]
    lengths = [torch.linalg.vector_norm(delta, dim=-1) for delta in doubles]
    live = torch.stack([length != 0 for length in lengths]).any(0)
    x = x.masked_fill(~live.unsqueeze(-1), 0.0).double()
    x_norm = torch.linalg.matrix_norm(x)
    right = over_batch(_triangle, _finite(x, x_norm).mT).mT
    norms = [torch.linalg.vector_norm(length, dim=-1) for length in lengths]
    matrices = [
        over_batch(_triangle, _finite(delta, norm).mT) @ right for delta, norm in zip(doubles, norms, strict=True)
    ]
    sizes = torch.stack(norms) * x_norm
    arriving = _to_host(sizes, torch.stack([torch.linalg.matrix_norm(matrix) for matrix in matrices]))

    @np.errstate(all="ignore")  # what is not finite ends as NaN, where it should
    def finish() -> list[Core]:
        cores = []
        for matrix, size, frobenius in zip(matrices, *arriving(), strict=True):
            scale = np.where(np.isfinite(size), 1.0, np.nan)
            numbers = _numbers(scale, frobenius * scale, torch.finfo(torch.float64).eps * size * scale)
            route = f"{precision}: {matrix.shape[-1]}x{matrix.shape[-1]} triangular factors"
            cores.append(Core(matrix, None, False, *numbers, torch.float64, route))
        return cores

    return finish


def _triangle(matrices: Tensor) -> Tensor:
    return torch.linalg.qr(matrices, mode="r").R


def _gradient_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> Callable[[], list[Core]]:
    live = torch.stack([(delta != 0).any(-1) for delta in deltas]).any(0)
    x = _operand(x.masked_fill(~live.unsqueeze(-1), 0.0), precision)
    squared = precision != "reference"
    matrices, norms = [], []
    for original in deltas:
        delta = _operand(original, precision)
        gradient = matmul(delta.mT, x) if delta.shape[-1] <= x.shape[-1] else matmul(x.mT, delta)
        norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=torch.float64)
        norms.append(norm)
        ok = _in_range(norm, precision)
        gradient.masked_fill_(~ok[:, None, None], 0.0)
        matrices.append(outer_square(gradient) if squared else gradient)
    arriving = _to_host(torch.stack(norms))
    eps = torch.finfo(_work_dtype(precision)).eps

    @np.errstate(all="ignore")  # what is not finite ends as NaN, where it should
    def finish() -> list[Core]:
        (norms,) = arriving()
        cores = []
        for matrix, norm in zip(matrices, norms, strict=True):
            ok = _in_range(norm, precision)
            scale = _power_of_two(norm, ok) if squared else np.ones_like(norm)
            scale, norm = np.where(ok, scale, np.nan), np.where(ok, norm, np.nan)
            numbers = _numbers(scale, norm, (eps**0.5 if squared else eps) * norm)
            route = f"{precision}: {matrix.shape[-2]}x{matrix.shape[-2]} " + ("Gram of G" if squared else "G")
            cores.append(Core(matrix, None, squared, *numbers, _work_dtype(precision), route))
        return cores

    return finish


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


def _to_host(*numbers: Tensor) -> Callable[[], list[np.ndarray]]:
    """Tensors on the CPU in float64, in one transfer that is waited for when the result is called."""
    joined = torch.cat([tensor.flatten().double() for tensor in numbers])
    shapes = [tensor.shape for tensor in numbers]
    arrived = None
    host = joined.detach().to("cpu", non_blocking=joined.is_cuda)
    if joined.is_cuda:
        arrived = torch.cuda.current_stream(joined.device).record_event()

    def wait() -> list[np.ndarray]:
        if arrived is not None:
            arrived.synchronize()
        parts = host.split([shape.numel() for shape in shapes])
        return [part.view(shape).numpy() for part, shape in zip(parts, shapes, strict=True)]

    return wait


def _numbers(scale: np.ndarray, frobenius: np.ndarray, floor: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """What a core keeps of each sample."""
    return torch.from_numpy(scale), torch.from_numpy(frobenius), torch.from_numpy(floor)


def _in_range(size: Tensor | np.ndarray, precision: str) -> Any:
    low, high = IN_RANGE if precision == "fast" else (0.0, torch.finfo(torch.float64).max)
    return (size >= low) & (size <= high)


def _power_of_two(size: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """The power of two next above a size, by which numbers are divided without rounding; 1 for zeros, and where not ok."""
    return np.ldexp(1.0, np.frexp(np.where(ok & (size > 0), size, 0.5))[1])


def _finite(matrices: Tensor, norms: Tensor) -> Tensor:
    """The matrices with those whose norm is not finite replaced by zeros."""
    bad = ~norms.isfinite()
    return matrices.masked_fill(bad[:, None, None], 0.0) if bad.any() else matrices
