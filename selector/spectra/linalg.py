"""Roots of eigenvalues, and factors, of batches of small positive semidefinite matrices.

On an NVIDIA GPU eigenvalues come from Triton kernels: the library solvers there take 4 to 15 ms for a matrix of size 512,
the kernels about 0.05. Elsewhere, and where Triton is missing, they come from `torch.linalg.eigvalsh`; the two agree.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from selector.spectra.threads import over_batch

JITTER = 32
"""How many ε of itself a diagonal entry is raised by before a Cholesky factorisation; eight times that when it fails."""


def root_eigenvalues(matrices: Float[Tensor, "N n n"]) -> Float[Tensor, "N n"]:
    """Square roots of the eigenvalues of positive semidefinite matrices.

    Args:
        matrices: finite, symmetric up to rounding, float32 or float64; overwritten. On the kernels' path n is a multiple of 64.

    Returns:
        Roots, descending, with errors of sqrt(ε) of the largest one; eigenvalues that rounding made negative count as zero.
    """
    if not matrices.numel():
        return matrices.new_zeros(matrices.shape[:2])
    if not uses_kernels(matrices):
        return over_batch(torch.linalg.eigvalsh, matrices).clamp_min(0).sqrt().flip(-1)
    from selector.spectra.kernels import bisect_roots, tridiagonalize

    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    scale = torch.where(largest > 0, largest, 1.0)
    return bisect_roots(*tridiagonalize(matrices.div_(scale[:, None, None]))) * scale.sqrt().unsqueeze(-1)


def semidefinite_factor(matrices: Float[Tensor, "N n n"]) -> Float[Tensor, "N n n"]:
    """L with L Lᵀ close to a positive semidefinite matrix, singular ones included.

    A few dozen ε of itself are added to each diagonal entry, which lets the Cholesky factorisation of most singular matrices
    finish; where it does not, eight times as much, and then the root of the eigendecomposition takes its place.

    Args:
        matrices: finite, positive semidefinite up to rounding, float32 or float64.

    Returns:
        The factor. A zero row of the matrix gives a zero row and column.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    empty = diagonal <= 0
    jitter = JITTER * torch.finfo(matrices.dtype).eps
    lower, failed = _cholesky(matrices, torch.where(empty, 1.0, jitter * diagonal))
    if len(failed):
        lower[failed], still = _cholesky(matrices[failed], torch.where(empty, 1.0, 8 * jitter * diagonal)[failed])
        if len(still):
            values, vectors = torch.linalg.eigh(matrices[failed[still]])
            lower[failed[still]] = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return lower.masked_fill_(empty.unsqueeze(-2), 0.0)


def matmul(a: Float[Tensor, "N m k"], b: Float[Tensor, "N k n"]) -> Float[Tensor, "N m n"]:
    """Batched product, accumulated in float32 or better and rounded no further: never in tf32, never to 16 bits.

    Args:
        a: left operands, any floating dtype.
        b: right operands of the same dtype.

    Returns:
        Products, float32 for operands of 16 bits, else in the operands' dtype.
    """
    if a.element_size() == 2:
        if a.is_cuda and _bmm_widens():
            return torch.bmm(a, b, out_dtype=torch.float32)
        a, b = a.float(), b.float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision(before)


def uses_kernels(tensor: Tensor) -> bool:
    """Whether matrices like this one are solved by the Triton kernels."""
    return tensor.is_cuda and torch.version.hip is None and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _bmm_widens() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def _cholesky(matrices: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    raised = matrices.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(added)
    lower, info = torch.linalg.cholesky_ex(raised)
    return lower, info.nonzero().flatten()
