"""Tridiagonal form of large symmetric matrices in two stages, by way of a band matrix.

Reduction in one stage passes over the shrinking matrix once per column, so that its price is memory traffic: 7.2 ms at best for a
float32 matrix of size 3584 on a GPU that copies 4.25 TB/s, of which 15 were reached. Here

    1.  dense to band    `width` columns at a time: a QR factorisation of the panel below the band by Householder reflectors,
                         Q = I - V T Vᵀ, and A <- Qᵀ A Q in three products with A, which run at the speed of arithmetic (2 n³
                         operations, 1.9 ms at 50 TFLOP/s) and read A 2 n / width times instead of n times;
    2.  band to tridiagonal    column by column, each reflector's bulge chased down the band, n² / (2 width) small tasks. Sweeps of many
                         columns run at once, each two tasks behind the one before it.

A wide band makes the first stage cheaper and the second dearer. The price against one stage: half as many operations again, none of
which small matrices can hide, and a second set of kernels. The panel factorisation is Householder's also inside, recursively, so that
singular and rank deficient panels need no special case (a Cholesky QR would).

Only two steps are not products, the reflectors of a narrow panel and the chase. Both are Triton kernels on an NVIDIA GPU and
plain torch elsewhere, step by step the same.

Source: Schreiber and Van Loan 1989 (V T Vᵀ); Elmroth and Gustavson 2000 (recursive QR); Bischof, Lang and Sun 2000 (successive band
reduction); Lang 1993 and Haidar, Ltaief and Dongarra 2011 (pipelined bulge chasing).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.spectra.linalg import full_precision, uses_kernels

WIDTH = 32
"""Half the bandwidth in between. At 64 products are a quarter cheaper and the chase three times dearer."""
LEAF = 16
"""Columns whose reflectors are formed one by one; wider panels are halved."""
TOLERANCE = 1e-4
"""Largest share by which the chase may change the squared norm of a band; rounding alone stays far below."""


def tridiagonalize_by_band(
    matrices: Float[Tensor, "N n n"], width: int = WIDTH
) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N n"]]:
    """Reduce symmetric matrices to tridiagonal ones with the same eigenvalues.

    Args:
        matrices: finite, symmetric, float32 or float64, of magnitude near 1; destroyed.
        width: half the bandwidth in between, a power of two, of which n is a multiple.

    Returns:
        Diagonals, and off-diagonals whose last entry is 0; NaN where the chase did not keep the norm of the band.
    """
    band = reduce_to_band(matrices, width)
    before = _squared_norm(band)
    chase_bulges(band)
    diagonal, off_diagonal = band[:, :, 0].contiguous(), band[:, :, 1].contiguous()
    # Thousands of programs hand the band to each other: if that ever fails, nobody shall take the result for eigenvalues.
    kept = (_squared_norm(band[:, :, :2]) - before).abs() <= TOLERANCE * before
    return diagonal.masked_fill_(~kept.unsqueeze(-1), torch.nan), off_diagonal


def _squared_norm(band: Tensor) -> Tensor:
    """Of symmetric band matrices."""
    squares = band.double().square()
    return 2 * squares.sum((1, 2)) - squares[:, :, 0].sum(1)


def reduce_to_band(matrices: Float[Tensor, "N n n"], width: int) -> Float[Tensor, "N n _"]:
    """Stage 1.

    Args:
        matrices: as above; destroyed.
        width: as above.

    Returns:
        `[N, n, 2 width]`: entry [j, d] is the band matrix's (j, j + d); zeros for d > width, which leave room for bulges.
    """
    batch, n = matrices.shape[:2]
    # The update is one product: [V; Z]ᵀ [Z; V]. Rows are reflectors, so that all kernels run along memory.
    left, right = (matrices.new_empty(batch, 2 * width, n) for _ in range(2))
    triangle = matrices.new_empty(batch, width, width)
    with full_precision():
        for k in range(0, n - width, width):
            start = k + width
            v, z = left[:, :width, start:], left[:, width:, start:]
            v.copy_(matrices[:, k:start, start:])
            triangle.zero_()
            _factor_panel(matrices, left, triangle, k, 0, width)
            trailing = matrices[:, start:, start:]
            w = torch.bmm(triangle.mT @ v, trailing, out=right[:, :width, start:])
            torch.baddbmm(w, (w @ v.mT) @ triangle, v, alpha=-0.5, out=z)
            w.copy_(z)
            right[:, width:, start:] = v
            trailing.baddbmm_(left[:, :, start:].mT, right[:, :, start:], alpha=-1)
    return _pack(matrices, width)


def chase_bulges(band: Float[Tensor, "N n _"]) -> None:
    """Stage 2, in place: afterwards [:, :, 0] and [:, :, 1] hold the diagonal and the off-diagonal.

    Args:
        band: what `reduce_to_band` returned.
    """
    if uses_kernels(band):
        from selector.spectra.band_kernels import chase_bulges as chase

        chase(band)
        return
    n, width = band.shape[1], band.shape[2] // 2
    for s in range(n - 2):
        # The reflector of one task is applied from the other side by the next one.
        v, tau = band.new_empty(0), band.new_empty(0)
        for r in range(s + 1, n, width):
            rows = min(width, n - r)
            if r == s + 1:
                x = _block(band, s, r, 1, rows)[:, 0]
                v, tau, beta = _reflector(x)
                x.zero_()
                x[:, 0] = beta
            else:
                block = _block(band, r - width, r, width, rows)
                block -= tau[:, None, None] * v.unsqueeze(2) * (v.unsqueeze(1) @ block)
                v, tau, beta = _reflector(block[:, 0])
                block -= tau[:, None, None] * (block @ v.unsqueeze(2)) * v.unsqueeze(1)
                block[:, 0] = 0
                block[:, 0, 0] = beta
            block = _block(band, r, r, rows, rows)
            upper = block.triu()
            w = tau.unsqueeze(1) * ((upper + upper.triu(1).mT) @ v.unsqueeze(2)).squeeze(2)
            w -= 0.5 * (tau * (v * w).sum(1)).unsqueeze(1) * v
            outer = v.unsqueeze(2) * w.unsqueeze(1)
            block -= (outer + outer.mT).triu()  # below the diagonal lie other entries of the band


def _block(band: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    """A view of a block of the band matrix, which is a plain strided one in this storage."""
    n, stride = band.shape[1:]
    at = band.storage_offset() + row * (stride - 1) + column
    return band.as_strided((len(band), rows, columns), (n * stride, stride - 1, 1), at)


def _reflector(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v with v[0] = 1, tau and beta of I - tau v vᵀ, which maps x `[N, m]` to (beta, 0, ..., 0)."""
    alpha, squares = x[:, 0], x[:, 1:].square().sum(1)
    flat = squares < negligible(x.dtype)
    norm = (alpha.square() + squares).sqrt()
    beta = torch.where(flat, alpha, torch.where(alpha > 0, -norm, norm))
    v = x * torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, alpha - beta)).unsqueeze(1)
    v[:, 0] = 1
    return v, torch.where(flat, 0.0, (beta - alpha) / torch.where(flat, 1.0, beta)), beta


def negligible(dtype: torch.dtype) -> float:
    """Sum of squares that counts as zero beside entries near 1: below it squares lose digits, and a reflector would not be orthogonal."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _factor_panel(matrices: Tensor, reflectors: Tensor, triangle: Tensor, k: int, first: int, last: int) -> None:
    """V and T of columns k + first ... k + last of the matrix, below the band, whose transpose is in the rows first ... last of `reflectors`.

    R goes to rows k + first ... of the matrix, where it is part of the band. By halves: left, right after the left's reflectors, and
    the corner of T.
    """
    width = triangle.shape[1]
    if last - first <= LEAF:
        _form_reflectors(matrices, reflectors, triangle, k, first, last)
        return
    middle = (first + last) // 2
    _factor_panel(matrices, reflectors, triangle, k, first, middle)
    head = k + width + first
    left, right = reflectors[:, first:middle, head:], reflectors[:, middle:last, head:]
    corner = triangle[:, first:middle, middle:last]
    right.baddbmm_((right @ left.mT) @ triangle[:, first:middle, first:middle], left, alpha=-1)
    _factor_panel(matrices, reflectors, triangle, k, middle, last)
    products = triangle[:, first:middle, first:middle] @ (left @ right.mT)
    torch.baddbmm(corner, products, triangle[:, middle:last, middle:last], beta=0, alpha=-1, out=corner)


def _form_reflectors(matrices: Tensor, reflectors: Tensor, triangle: Tensor, k: int, first: int, last: int) -> None:
    """One reflector after the other, each applied to the rest of these columns."""
    if uses_kernels(matrices):
        from selector.spectra.band_kernels import form_reflectors

        form_reflectors(matrices, reflectors, triangle, k, first, last)
        return
    begin = k + triangle.shape[1]
    for i in range(first, last):
        head = begin + i
        v, tau, beta = _reflector(reflectors[:, i, head:])
        matrices[:, k + i, begin:head] = reflectors[:, i, begin:head]
        matrices[:, k + i, head] = beta
        reflectors[:, i, begin:head] = 0
        reflectors[:, i, head:] = v
        rest = reflectors[:, i + 1 : last, head:]
        rest -= tau[:, None, None] * (rest @ v.unsqueeze(2)) * v.unsqueeze(1)
        before = triangle[:, first:i, first:i] @ (reflectors[:, first:i, head:] @ v.unsqueeze(2))
        triangle[:, first:i, i] = -tau.unsqueeze(1) * before.squeeze(2)
        triangle[:, i, i] = tau


def _pack(matrices: Tensor, width: int) -> Tensor:
    """Band storage of the upper triangle of matrices, which are symmetric band matrices up to rubbish outside the band."""
    batch, n = matrices.shape[:2]
    band = matrices.new_zeros(batch, n, 2 * width)
    whole = n - width  # rows whose band does not end at the last column
    band[:, :whole, : width + 1] = matrices.as_strided((batch, whole, width + 1), (n * n, n + 1, 1))
    corner = matrices[:, whole:, whole:]
    for d in range(width):
        band[:, whole : n - d, d] = corner.diagonal(d, 1, 2)
    return band
