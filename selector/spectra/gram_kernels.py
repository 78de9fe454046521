"""What a layer's Gram matrices are asked for, in one pass over them on an NVIDIA GPU instead of a dozen."""

from __future__ import annotations

from functools import partial

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

from selector.spectra.kernels import kernel

ROWS, COLUMNS = 32, 64


@kernel
def _live(rights_ptr, i, n, stride, projections):
    """Whether any projection's matrix has something on the diagonal."""
    live = i < 0
    for p in range(projections):
        diagonal = tl.load(rights_ptr + p * stride + i * (n + 1), mask=i < n, other=0.0)
        live |= diagonal != 0
    return live


@partial(kernel, plain=["n", "batch", "projections"])
def _mask_and_sum(left_ptr, rights_ptr, out_ptr, n, batch, projections, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A run of rows of one sample's left matrix and of its right one for one projection."""
    m, block, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    left, rights = left_ptr + m * n * n, rights_ptr + m * n * n
    stride = batch.to(tl.int64) * n * n
    r = block * ROWS + tl.arange(0, ROWS)
    live_rows = _live(rights, r, n, stride, projections)
    squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    right_squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    products = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    for start in range(0, n, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        live = live_rows[:, None] & _live(rights, c, n, stride, projections)[None, :]
        inside = (r < n)[:, None] & (c < n)[None, :]
        at = r[:, None] * n + c[None, :]
        found = tl.load(left + at, mask=inside & live, other=0.0)
        right = tl.load(rights + p * stride + at, mask=inside, other=0.0).to(tl.float64)
        tl.store(left + at, found, mask=inside & (p == 0))
        found = found.to(tl.float64)
        squares += found * found
        right_squares += right * right
        products += found * right
    out = out_ptr + ((block * batch + m) * projections + p) * 3
    tl.store(out, tl.sum(squares))
    tl.store(out + 1, tl.sum(right_squares))
    tl.store(out + 2, tl.sum(products))


def mask_and_sum(left: Float[Tensor, "N n n"], rights: Float[Tensor, "P N n n"]) -> Float[Tensor, "N P 3"]:
    """As `routes._mask`.

    Args:
        left: what all projections share; rows and columns that none uses are cleared.
        rights: one of each projection.
    """
    projections, batch, n = rights.shape[:3]
    blocks = triton.cdiv(n, ROWS)
    out = left.new_zeros(max(blocks, 1), batch, projections, 3, dtype=torch.float64)
    if left.numel():
        _mask_and_sum[(batch, blocks, projections)](
            left, rights, out, n, batch, projections, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    return out.sum(0)
