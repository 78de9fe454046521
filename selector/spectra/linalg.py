"""Roots of eigenvalues, and factors, of batches of small positive semidefinite matrices.

On an NVIDIA GPU eigenvalues come from Triton kernels: the library solvers there take 4 to 15 ms for a matrix of size 512,
the kernels about 0.05. Elsewhere, and where Triton is missing, they come from `torch.linalg.eigvalsh`; the two agree.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selector.runtime import torch_is_at_least
from selector.spectra.threads import over_batch

BAND_FROM = 160, 1 << 25
"""Size of float32 matrices, and numbers in a batch of them, from which they are reduced by way of a band: fewer leave the GPU waiting for launches."""
BLOCKS_FROM, BLOCK = 448, 64
"""Size of matrices from which products of triangular ones pay by blocks, and what their columns are a multiple of."""
TRACE_TOLERANCE = 1e-2
"""Largest share of the trace by which eigenvalues may miss it; rounding alone stays a hundred times below."""


def root_eigenvalues(matrices: Float[Tensor, "N n n"], dtype: torch.dtype | None = None) -> Float[Tensor, "N n"]:
    """Square roots of the eigenvalues of positive semidefinite matrices.

    Args:
        matrices: finite, float32 or float64, read on and above the diagonal, of a size that `padded_size` leaves as it is.
        dtype: float32 or float64, in which to seek them; that of the matrices when None.

    Returns:
        Roots, descending, with errors of sqrt(ε) of the largest one; eigenvalues that rounding made negative count as zero.
        NaN for a matrix whose eigenvalues could not be found.
    """
    dtype = dtype or matrices.dtype
    if not matrices.numel():
        return matrices.new_zeros(matrices.shape[:2], dtype=dtype)
    if not uses_kernels(matrices):
        return over_batch(_upper_eigenvalues, matrices.to(dtype)).clamp_min(0).sqrt().flip(-1)
    from selector.spectra.kernels import bisect_roots
    from selector.spectra.symmetric_kernels import mirrored

    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    largest, trace = diagonal.amax(-1), diagonal.sum(-1)
    scale = torch.where(largest > 0, largest, 1.0)
    tridiagonal, off_diagonal = _tridiagonalize(mirrored(matrices.contiguous(), scale, dtype))
    roots = bisect_roots(tridiagonal, off_diagonal)[:, : matrices.shape[-1]] * scale.sqrt().to(dtype).unsqueeze(-1)
    # eigenvalues add up to the trace: a kernel that went wrong must not pass unseen
    ok = ((roots.square().sum(-1) - trace).abs() <= TRACE_TOLERANCE * trace) & tridiagonal.isfinite().all(-1)
    return roots.masked_fill(~ok.unsqueeze(-1), torch.nan)


def semidefinite_factor(matrices: Float[Tensor, "N n n"]) -> Float[Tensor, "N n n"]:
    """L with L Lᵀ close to a positive semidefinite matrix, singular ones included.

    The Cholesky factorisation runs in float64 also for float32 matrices: its own rounding in float32 would cost more accuracy
    than that of the matrix. A little of itself is added to each diagonal entry, so that singular matrices pass too: a few dozen ε
    of float64 at first, more where rounding of the matrix itself asks for it, and at last the root of the eigendecomposition.

    Args:
        matrices: finite, positive semidefinite up to rounding, float32 or float64.

    Returns:
        The factor, lower triangular, float64. A zero row of the matrix gives a zero row.
    """
    own, double = torch.finfo(matrices.dtype).eps, torch.finfo(torch.float64).eps
    empty = matrices.diagonal(dim1=-2, dim2=-1) <= 0
    lower, failed = _cholesky(matrices, 32 * double)
    for jitter in (max(own, 128 * double), max(8 * own, 1024 * double)):
        if len(failed):
            lower[failed], still = _cholesky(matrices[failed], jitter)
            failed = failed[still]
    lower.diagonal(dim1=-2, dim2=-1).masked_fill_(empty, 0.0)
    if len(failed):
        # columns of this root belong to eigenvectors, not to rows of the matrix: only rows may be cleared
        values, vectors = torch.linalg.eigh(matrices[failed].double())
        roots = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        roots.masked_fill_(empty[failed].unsqueeze(-1), 0.0)
        lower[failed] = torch.linalg.qr(roots.mT, mode="r").R.mT
    return lower


def congruence(lower: Float[Tensor, "N n n"], symmetric: Float[Tensor, "N n n"]) -> Float[Tensor, "N n n"]:
    """The upper triangle of Lᵀ S L, by blocks, which leaves out about half of the products with zeros or below the diagonal.

    Args:
        lower: L, lower triangular.
        symmetric: S, of the same dtype.

    Returns:
        Products; anything in the blocks below the diagonal.
    """
    n = lower.shape[-1]
    step = -(-n // (4 * BLOCK)) * BLOCK if n >= BLOCKS_FROM else n
    blocks = [slice(start, start + step) for start in range(0, n, max(step, 1))]
    out = torch.empty_like(symmetric)
    for j in blocks:
        right = symmetric[:, :, j.start :] @ lower[:, j.start :, j]
        for i in blocks:
            if i.start <= j.start:
                torch.bmm(lower[:, i.start :, i].mT, right[:, i.start :], out=out[:, i, j])
    return out


def outer_square(matrices: Float[Tensor, "N n k"]) -> Float[Tensor, "N n n"]:
    """M Mᵀ, of large matrices only the upper triangle, which is all that `root_eigenvalues` reads.

    Args:
        matrices: M, float32 or float64.

    Returns:
        Products, float64.
    """
    n = matrices.shape[-2]
    step = n if n < 1024 else 512
    double = matrices.double()
    out = double.new_zeros(len(matrices), n, n)
    for start in range(0, n, max(step, 1)):
        out[:, start : start + step, start:] = double[:, start : start + step] @ double[:, start:].mT
    return out


def matmul(a: Float[Tensor, "N m k"], b: Float[Tensor, "N k n"]) -> Float[Tensor, "N m n"]:
    """Batched product, accumulated in float32 or better and rounded no further: never in tf32, never to 16 bits.

    Args:
        a: left operands, any floating dtype.
        b: right operands of the same dtype.

    Returns:
        Products, float32 for operands of 16 bits, else in the operands' dtype.
    """
    if a.element_size() == 2:
        if a.is_cuda and torch_is_at_least(2, 8):  # from where bmm takes 16 bits and gives 32
            return torch.bmm(a, b, out_dtype=torch.float32)
        a, b = a.float(), b.float()
    with full_precision():
        return a @ b


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the user has set for the model's own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def uses_kernels(tensor: Tensor) -> bool:
    """Whether matrices like this one are solved by the Triton kernels."""
    return tensor.is_cuda and torch.version.hip is None and _has_triton()


def padded_size(size: int, like: Tensor) -> int:
    """Size to which matrices are best padded with zeros before their eigenvalues are sought.

    Args:
        size: of the matrices.
        like: tells their dtype and device.
    """
    if not uses_kernels(like):
        return size
    from selector.spectra.band import WIDTH
    from selector.spectra.resident import LARGEST

    return size if size <= LARGEST else -(-size // WIDTH) * WIDTH


def _tridiagonalize(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """In registers where a matrix fits, by way of a band where it is large, else in one stage; matrices, which are whole, are destroyed."""
    from selector.spectra.kernels import TILE, tridiagonalize
    from selector.spectra.resident import LARGEST, tridiagonalize_resident

    n = matrices.shape[-1]
    if n <= LARGEST:
        return tridiagonalize_resident(matrices)
    if n >= BAND_FROM[0] and matrices.numel() >= BAND_FROM[1] and matrices.dtype == torch.float32:
        from selector.spectra.band import tridiagonalize_by_band

        return tridiagonalize_by_band(matrices)
    more = -n % TILE
    return tridiagonalize(F.pad(matrices, (0, more, 0, more)) if more else matrices)


def _upper_eigenvalues(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrices, UPLO="U")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cholesky(matrices: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Factors in float64, and the positions of those that failed."""
    raised = matrices.to(torch.float64, copy=True)
    diagonal = raised.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + jitter), 1.0))
    # the library works on columns, and would copy rows to columns first
    lower, info = torch.linalg.cholesky_ex(raised.mT)
    return lower, info.nonzero().flatten()
