"""Tridiagonalization of symmetric matrices that fit into the registers of one program, on an NVIDIA GPU.

A matrix stays in registers from its first column to its last: memory is read once, and what a column costs is the latency of two
sums over the rows. Each thread adds up its own rows first, and warps exchange the rest; sums along the rows would be shuffles.

Source: Golub and Van Loan, Matrix Computations, section 8.3.1.
"""

from __future__ import annotations

from functools import partial

import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

from selector.spectra.kernels import NEGLIGIBLE, kernel, power_of_two, reflector_scalars

LARGEST = 128
"""Rows of the largest matrix that one program holds. Three blocks in place of one would hold 256, but spill: 27 instead of 13 µs."""


@kernel
def _add(a, b, c, d):
    return a + c, b + d


# A size that is a multiple of 16 would be compiled apart, with loads of four numbers a thread, whose layout makes the sums dearer.
@partial(kernel, plain=["n"])
def _tridiagonalize(a_ptr, d_ptr, e_ptr, n, negligible, SIZE: tl.constexpr):
    """Householder tridiagonalization of matrices of at most SIZE rows, one for each program."""
    m = tl.program_id(0).to(tl.int64)
    a_ptr += m * n * n
    d, e = d_ptr + m * n, e_ptr + m * n
    i = tl.arange(0, SIZE)
    # Read along memory, so that neighbouring lanes hold a row: the compiler keeps the layout of this load for all that follows.
    upper = tl.load(a_ptr + i[:, None] * n + i[None, :], mask=(i[:, None] <= i[None, :]) & (i < n)[None, :], other=0.0)
    a = upper + tl.trans(tl.where(i[:, None] < i[None, :], upper, 0.0))
    x = tl.sum(tl.where(i[:, None] == 0, a, 0.0), 0)
    for k in range(n - 1):
        tl.store(d + i, x, mask=i == k)
        # The reflector I - tau v vᵀ that maps the row behind the diagonal to (beta, 0, ..., 0), with v[k + 1] = 1.
        alpha, squares = tl.reduce((tl.where(i == k + 1, x, 0.0), tl.where(i > k + 1, x * x, 0.0)), 0, _add)
        beta, tau, inverse = reflector_scalars(alpha, squares, negligible)
        tl.store(e + k, beta)
        v = tl.where(i > k + 1, x * inverse, tl.where(i == k + 1, 1.0, 0.0))
        # A v and row k + 1 of A in one pass
        y, row = tl.reduce((a * v[:, None], tl.where(i[:, None] == k + 1, a, 0.0)), 0, _add)
        w = tau * y - (0.5 * tau * tau * tl.sum(v * y)) * v
        x = row - (w + tl.sum(tl.where(i == k + 1, w, 0.0)) * v)
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
    tl.store(d + i, x, mask=i == n - 1)


def tridiagonalize_resident(
    matrices: Float[Tensor, "N n n"],
) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N n"]]:
    """Reduce symmetric matrices to tridiagonal ones with the same eigenvalues.

    Args:
        matrices: finite, float32 or float64, of magnitude near 1, of at most `LARGEST` rows, read on and above the diagonal.

    Returns:
        Diagonals, and off-diagonals whose last entry is 0.
    """
    batch, n = matrices.shape[:2]
    diagonal = matrices.new_empty(batch, n)
    off_diagonal = matrices.new_zeros(batch, n)
    size = max(power_of_two(n), 16)
    # As few warps as registers allow: what sums cost is the exchange between them.
    warps = max(size * size * matrices.element_size() // 16384, 1)
    _tridiagonalize[(batch,)](matrices, diagonal, off_diagonal, n, NEGLIGIBLE, SIZE=size, num_warps=warps)
    return diagonal, off_diagonal
