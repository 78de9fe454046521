"""Symmetric matrices made ready for the eigen-solver in one pass on an NVIDIA GPU: torch takes half a dozen, which memory traffic makes dear."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

from selector.spectra.kernels import kernel

TILE = 32
"""Rows and columns that one program takes."""


@kernel
def _mirror(a_ptr, scale_ptr, out_ptr, n, TILE: tl.constexpr):
    """A tile on or above the diagonal, divided by the scale of its matrix, and its mirror image."""
    m = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) <= tl.program_id(2):
        r = tl.program_id(1) * TILE + tl.arange(0, TILE)
        c = tl.program_id(2) * TILE + tl.arange(0, TILE)
        upper = (r[:, None] <= c[None, :]) & (c < n)[None, :]
        found = tl.load(a_ptr + m * n * n + r[:, None] * n + c[None, :], mask=upper, other=0.0)
        found = (found / tl.load(scale_ptr + m)).to(out_ptr.dtype.element_ty)
        out = out_ptr + m * n * n
        tl.store(out + r[:, None] * n + c[None, :], found, mask=upper)
        lower = (r[None, :] < c[:, None]) & (c < n)[:, None]
        tl.store(out + c[:, None] * n + r[None, :], tl.trans(found), mask=lower)


def mirrored(
    matrices: Float[Tensor, "N n n"], scale: Float[Tensor, " N"], dtype: torch.dtype
) -> Float[Tensor, "N n n"]:
    """Symmetric matrices from their upper triangles, divided by a number each.

    Args:
        matrices: read on and above the diagonal, contiguous, float32 or float64.
        scale: the divisors, of the same dtype.
        dtype: of the result, float32 or float64.

    Returns:
        Whole matrices, unitless, both triangles filled.
    """
    out = torch.empty_like(matrices, dtype=dtype)
    batch, n = matrices.shape[:2]
    tiles = triton.cdiv(n, TILE)
    if matrices.numel():
        _mirror[(batch, tiles, tiles)](matrices, scale, out, n, TILE=TILE, num_warps=4)
    return out
