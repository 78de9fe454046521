"""Weights of tokens and their gradients on an NVIDIA GPU, reading each row of logits once and writing each gradient once."""

from __future__ import annotations

import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

from selector.spectra.kernels import kernel

BLOCK, WARPS = 4096, 8
LOWEST = tl.constexpr(-3e38)
"""Below every logit that counts, and finite: a difference of infinities would be no number."""


@kernel
def _weigh(logits_ptr, row_ptr, token_ptr, largest_ptr, own_ptr, others_ptr, width, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    logits = logits_ptr + tl.load(row_ptr + p) * width
    token = tl.load(token_ptr + p)
    dtype = largest_ptr.dtype.element_ty
    # each lane has a largest logit and a sum of its own, so that nothing is exchanged before the end of the row
    largest = tl.full([BLOCK], LOWEST, dtype=dtype)
    others = tl.zeros([BLOCK], dtype=dtype)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(logits + j, mask=j < width, other=float("-inf")).to(dtype)
        raised = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        others = others * tl.exp(largest - raised) + tl.where(j == token, 0.0, tl.exp(x - raised))
        largest = raised
    top = tl.max(largest, 0)
    tl.store(largest_ptr + p, top)
    tl.store(own_ptr + p, tl.load(logits + token).to(dtype) - top)
    tl.store(others_ptr + p, tl.sum(others * tl.exp(largest - top), 0))


@kernel
def _spread(logits_ptr, row_ptr, token_ptr, largest_ptr, others_ptr, factor_ptr, out_ptr, width, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    row = tl.load(row_ptr + p) * width
    token = tl.load(token_ptr + p)
    largest, others, factor = tl.load(largest_ptr + p), tl.load(others_ptr + p), tl.load(factor_ptr + p)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row + j, mask=j < width, other=0.0).to(largest.dtype)
        weight = tl.where(j == token, -others, tl.exp(x - largest))
        tl.store(out_ptr + row + j, (weight * factor).to(out_ptr.dtype.element_ty), mask=j < width)


def weigh(
    logits: Float[Tensor, "M V"],
    rows: Int[Tensor, " P"],
    tokens: Int[Tensor, " P"],
    largest: Float[Tensor, " P"],
    own: Float[Tensor, " P"],
    others: Float[Tensor, " P"],
) -> None:
    """Fill in, for each token, the largest logit of its row, its own logit less that, and what the other tokens weigh.

    Args:
        logits: next-token scores.
        rows: which row predicts each token.
        tokens: the tokens.
        largest: filled.
        own: filled.
        others: filled; the sum of exp(logit - largest) over all tokens but the row's own.
    """
    _weigh[(len(rows),)](logits, rows, tokens, largest, own, others, logits.shape[1], BLOCK=BLOCK, num_warps=WARPS)


def spread(
    logits: Float[Tensor, "M V"],
    rows: Int[Tensor, " P"],
    tokens: Int[Tensor, " P"],
    largest: Float[Tensor, " P"],
    others: Float[Tensor, " P"],
    factor: Float[Tensor, " P"],
    out: Float[Tensor, "M V"],
) -> None:
    """Fill in the rows of a gradient: factor times the weight of each token, of the row's own -factor times the others'.

    Args:
        logits: next-token scores.
        rows: which row predicts each token.
        tokens: the tokens.
        largest: as `weigh` has given it.
        others: likewise.
        factor: one for each row.
        out: gradient with respect to the logits; rows that predict nothing are left alone.
    """
    _spread[(len(rows),)](
        logits, rows, tokens, largest, others, factor, out, logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
    )
