"""Triton kernels of the two steps of a band reduction that are not matrix products. `band.py` says what they are for.

Bulges are chased by one program per sweep (one column of one matrix), in a single launch. A sweep may do its task t when the sweep
before it has done task t + 1, which it reads from a counter in global memory. Programs take their sweep by a ticket when they start,
so that whom a program waits for has always started earlier: no cooperative launch is needed, and nothing can hang, however few programs
fit on the chip. A band of a matrix stays in the second-level cache between one sweep and the next that follows close behind.
A launch per step instead, 2 n of them, would cost more than the work.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from selector.spectra.band import negligible
from selector.spectra.kernels import kernel, reflector_scalars


@kernel
def _form_reflectors(
    a_ptr, v_ptr, t_ptr, k, first, n, a_stride, v_stride,
    SMALL: tl.constexpr, WIDTH: tl.constexpr, LEAF: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Reflectors of LEAF columns of a panel, one program for each matrix.

    Column j of the panel is row j of `v` from column `begin` on. One pass over the rows for each column: it applies the reflector
    to the rows below, writes it in place of its column, and forms the inner products of the next column with all rows: with those of
    reflectors for T, with those below for the next pass.
    """
    dtype = a_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64)
    begin = k + WIDTH
    i = tl.arange(0, LEAF)
    rows = v_ptr + m * v_stride + (first + i) * n
    out = a_ptr + m * a_stride + (k + first + i) * n

    # What earlier reflectors have made of the columns before the first head is R already.
    before = begin + tl.arange(0, WIDTH)
    done = (before < begin + first)[None, :]
    finished = rows[:, None] + before[None, :]
    tl.store(out[:, None] + before[None, :], tl.load(finished, mask=done, other=0.0), mask=done)
    tl.store(finished, tl.zeros([LEAF, WIDTH], dtype=dtype), mask=done)

    start = begin + first
    products = tl.zeros([LEAF, CHUNK], dtype=dtype)
    for at in range(start, n, CHUNK):
        c = at + tl.arange(0, CHUNK)
        tile = tl.load(rows[:, None] + c[None, :], mask=(c < n)[None, :], other=0.0)
        column = tl.sum(tl.where(i[:, None] == 0, tile, 0.0), 0)
        products += tile * tl.where(c > start, column, 0.0)[None, :]
    dots = tl.sum(products, 1)
    triangle = tl.zeros([LEAF, LEAF], dtype=dtype)
    for j in range(LEAF):
        head = start + j
        heads = tl.load(rows + head)
        beta, tau, inverse = reflector_scalars(
            tl.sum(tl.where(i == j, heads, 0.0)), tl.sum(tl.where(i == j, dots, 0.0)), SMALL
        )
        dots = heads + inverse * dots
        corner = -tau * tl.sum(triangle * tl.where(i < j, dots, 0.0)[None, :], 1)
        corner = tl.where(i < j, corner, tl.where(i == j, tau, 0.0))
        triangle = tl.where(i[None, :] == j, corner[:, None], triangle)
        below = tl.where(i > j, tau * dots, 0.0)
        tl.debug_barrier()
        products = tl.zeros([LEAF, CHUNK], dtype=dtype)
        for at in range(start, n, CHUNK):
            c = at + tl.arange(0, CHUNK)
            inside = (c < n)[None, :]
            tile = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0)
            column = tl.sum(tl.where(i[:, None] == j, tile, 0.0), 0)
            v = tl.where(c > head, column * inverse, tl.where(c == head, 1.0, 0.0))
            tile = tl.where(i[:, None] == j, v[None, :], tile - below[:, None] * v[None, :])
            tl.store(rows[:, None] + c[None, :], tile, mask=inside & (i >= j)[:, None])
            r = tl.where(c == head, beta, column)
            tl.store(a_ptr + m * a_stride + (k + first + j) * n + c, r, mask=(c <= head) & (c < n))
            following = tl.sum(tl.where(i[:, None] == j + 1, tile, 0.0), 0)
            products += tile * tl.where(c > head + 1, following, 0.0)[None, :]
        dots = tl.sum(products, 1)
        tl.debug_barrier()
    place = t_ptr + m * WIDTH * WIDTH + (first + i)[:, None] * WIDTH + (first + i)[None, :]
    tl.store(place, triangle)


@kernel
def _two_sided(tile, v, tau, WIDTH: tl.constexpr):
    """Apply a reflector from both sides to a symmetric block of which only the upper triangle is there, zeros below."""
    i = tl.arange(0, WIDTH)
    y = tl.sum(tile * v[:, None], 0)
    y += tl.sum(tl.where(i[:, None] < i[None, :], tile, 0.0) * v[None, :], 1)
    w = tau * y - (0.5 * tau * tau * tl.sum(v * y)) * v
    return tile - (v[:, None] * w[None, :] + w[:, None] * v[None, :])


@partial(kernel, plain=["batch", "group"])
def _chase_bulges(
    band_ptr, progress_ptr, ticket_ptr, n, batch, group,
    SMALL: tl.constexpr, FINISHED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One sweep: column s of a matrix made tridiagonal, and the bulge that this makes chased off the end of the band."""
    ticket = tl.atomic_add(ticket_ptr, 1)
    sweeps = n - 2
    # All sweeps of a group of matrices before those of the next group.
    leader = ticket // (sweeps * group) * group
    members = tl.minimum(group, batch - leader)
    rest = ticket - leader * sweeps
    s = rest // members
    m = (leader + rest % members).to(tl.int64)
    band = band_ptr + m * n * 2 * WIDTH
    progress = progress_ptr + m * n + s
    i = tl.arange(0, WIDTH)

    seen = tl.where(s > 0, 0, FINISHED)
    while seen < 2:
        seen = tl.atomic_add(progress - 1, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    # Entry (c, r) of the upper triangle lies at c (2 WIDTH - 1) + r, so that blocks are plain strided ones.
    offsets = i[:, None] * (2 * WIDTH - 1) + i[None, :]
    upper = i[:, None] <= i[None, :]
    r = s + 1
    inside = r + i < n
    head = band + s * (2 * WIDTH - 1) + r + i
    corner = band + r * 2 * WIDTH + offsets
    x = tl.load(head, mask=inside, other=0.0)
    diagonal = tl.load(corner, mask=inside[None, :] & upper, other=0.0)
    beta, tau, inverse = reflector_scalars(tl.sum(tl.where(i == 0, x, 0.0)), tl.sum(tl.where(i > 0, x * x, 0.0)), SMALL)
    v = tl.where(i == 0, 1.0, x * inverse)
    tl.store(head, tl.where(i == 0, beta, 0.0), mask=inside)
    tl.store(corner, _two_sided(diagonal, v, tau, WIDTH), mask=inside[None, :] & upper)

    done = 1
    r += WIDTH
    while r < n:
        tl.debug_barrier()
        tl.atomic_xchg(progress, done, sem="release", scope="gpu")
        while seen < done + 2:
            seen = tl.atomic_add(progress - 1, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
        # The block above the next one on the diagonal: the last reflector from the left, then one that clears its first row.
        inside = r + i < n
        head = band + (r - WIDTH) * (2 * WIDTH - 1) + r + i
        block = band + (r - WIDTH) * (2 * WIDTH - 1) + r + offsets
        corner = band + r * 2 * WIDTH + offsets
        tile = tl.load(block, mask=inside[None, :], other=0.0)
        x = tl.load(head, mask=inside, other=0.0)
        diagonal = tl.load(corner, mask=inside[None, :] & upper, other=0.0)
        y = tau * tl.sum(tile * v[:, None], 0)
        tile -= v[:, None] * y[None, :]
        x -= y
        beta, tau, inverse = reflector_scalars(
            tl.sum(tl.where(i == 0, x, 0.0)), tl.sum(tl.where(i > 0, x * x, 0.0)), SMALL
        )
        v = tl.where(i == 0, 1.0, x * inverse)
        y = tau * tl.sum(tile * v[None, :], 1)
        tile -= y[:, None] * v[None, :]
        tile = tl.where(i[:, None] == 0, tl.where(i == 0, beta, 0.0)[None, :], tile)
        tl.store(block, tile, mask=inside[None, :])
        tl.store(corner, _two_sided(diagonal, v, tau, WIDTH), mask=inside[None, :] & upper)
        done += 1
        r += WIDTH
    tl.debug_barrier()
    tl.atomic_xchg(progress, FINISHED, sem="release", scope="gpu")


def form_reflectors(matrices: Tensor, reflectors: Tensor, triangle: Tensor, k: int, first: int, last: int) -> None:
    """As `band._form_reflectors`.

    Args:
        matrices: [N, n, n], which gets R.
        reflectors: [N, at least width, n], rows of which hold columns and get reflectors.
        triangle: [N, width, width], which gets T.
        k: first row of the panel.
        first: first column of the panel.
        last: the one after the last.
    """
    batch, n = matrices.shape[:2]
    if not batch:
        return
    warps = 1 if n < 1024 else 2  # warps of one program wait for each other three times a column
    _form_reflectors[(batch,)](
        matrices, reflectors, triangle, k, first, n, matrices.stride(0), reflectors.stride(0),
        SMALL=negligible(matrices.dtype), WIDTH=triangle.shape[1], LEAF=last - first, CHUNK=128 * warps, num_warps=warps,
    )  # fmt: skip


def chase_bulges(band: Tensor) -> None:
    """As `band.chase_bulges`.

    Args:
        band: [N, n, 2 width].
    """
    batch, n, stride = band.shape
    if not batch or n < 3:
        return
    progress = torch.zeros(batch, n, dtype=torch.int32, device=band.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=band.device)
    # Matrices that are chased at a time: as few as keep the chip busy with n / 2 width sweeps of each, so that bands stay in cache.
    processors = torch.cuda.get_device_properties(band.device).multi_processor_count
    group = min(batch, max(24 * processors * stride // n, 1))
    # One warp to a program: what one lane has seen of the counter holds for the others. With more the results were wrong at times.
    _chase_bulges[(batch * (n - 2),)](
        band, progress, ticket, n, batch, group, SMALL=negligible(band.dtype), FINISHED=1 << 30, WIDTH=stride // 2, num_warps=1,
    )  # fmt: skip
