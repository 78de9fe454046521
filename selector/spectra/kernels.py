"""Eigenvalues of batches of symmetric matrices on an NVIDIA GPU: Householder tridiagonalization, then bisection.

Tridiagonalization has to pass over the shrinking matrix once per column, so its price is memory traffic. Three things keep it low:
only the upper triangle is read (each block serves its rows and its columns: n³/6 numbers instead of n³/3), reflectors are
gathered and applied a panel at a time, and one launch does all columns of all matrices, so that no launch waits for another.
Many matrices go one to a program; few large ones are shared by groups of programs that meet at a barrier in global memory. The
price of simplicity against a reduction by way of a band matrix: no use of tensor cores.

Eigenvalues of the tridiagonal matrices then come from Sturm counts, one lane each: a grid of points brackets all of them in one
pass, and bisection runs on the root, so that a given number of steps resolves singular values evenly.

Source: LAPACK's sytrd and stebz; Golub and Van Loan, Matrix Computations, sections 8.3.1 and 8.4.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

TILE = 64
"""Sizes of matrices are multiples of this."""
NEGLIGIBLE = 1e-36
"""Squared norm of a column that counts as zero in a matrix of magnitude 1. Kernels take numbers as float32, so that one value serves both dtypes."""
SMALLEST_PIVOT = 1e-30
"""Pivots of a Sturm count that are smaller count as this, below zero: a zero one would divide zero by zero."""


def power_of_two(n: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (n - 1).bit_length()


def kernel(function: Callable[..., Any], plain: Sequence[str] = ()) -> Any:
    """`triton.jit` of a function as it is written here, without the type checks that an import hook may have put around it.

    Args:
        function: the kernel.
        plain: integers for whose values (1, multiples of 16) no version of its own shall be compiled: numbers of matrices take all
            values, and each version costs seconds.
    """
    return triton.jit(inspect.unwrap(function), do_not_specialize=list(plain))


@kernel
def _barrier(counter, target, GROUP: tl.constexpr):
    """Wait until all programs of a group have come here `target` times, and see what they have written."""
    tl.debug_barrier()
    if GROUP > 1:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()


@kernel
def reflector_scalars(alpha, squares, negligible):
    """beta, tau and the factor of the tail of the reflector I - tau v vᵀ that maps (alpha, x) to (beta, 0), with squares = xᵀ x and v = (1, x * factor)."""
    norm = tl.sqrt(alpha * alpha + squares)
    # A column so small is nothing beside a matrix of magnitude 1, and roots and quotients of its squares would underflow.
    flat = squares <= negligible
    beta = tl.where(flat, alpha, tl.where(alpha > 0, -norm, norm))
    inverse = tl.where(flat, 0.0, 1.0 / tl.where(flat, 1.0, alpha - beta))
    tau = tl.where(flat, 0.0, (beta - alpha) / tl.where(flat, 1.0, beta))
    return beta, tau, inverse


@kernel
def _reflector(column, at, k, inverse):
    """Entries of the reflector of column k: 0 up to k, then 1, then the scaled column."""
    v = tl.load(column + at) * inverse
    return tl.where(at > k + 1, v, tl.where(at == k + 1, 1.0, 0.0))


@kernel
def _block(u, last):
    """Row and column of the u-th block on or above the diagonal, counted from the last block backwards."""
    t = ((tl.sqrt(8.0 * u + 1.0) - 1.0) * 0.5 + 1e-3).to(tl.int32)
    return last - t, last - (u - t * (t + 1) // 2)


@partial(kernel, plain=["batch", "n_groups"])
def _tridiagonalize(
    a_ptr, d_ptr, e_ptr, work_ptr, counter_ptr, n, batch, n_groups, work_stride, negligible,
    GROUP: tl.constexpr, PANEL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Householder tridiagonalization of symmetric matrices, one group of GROUP programs for each; destroys them.

    Only tiles on and above the diagonal are read. Reflectors gather in panels V, W, and the matrix is brought up to date once per
    panel: in between the current matrix is A - V Wᵀ - W Vᵀ. Per column there are two phases, each ended by a barrier:

      1. the reflector v of column k, and the product A v by tiles, each tile serving its rows and its columns;
      2. w from that product, column k + 1 of the current matrix, and its inner products with the panel.

    Work space of a matrix: V and W [PANEL, n], both again as [n, PANEL], the column [n], partial products [BLOCKS, n], sums [GROUP, 2 PANEL + 2].
    """
    dtype = a_ptr.dtype.element_ty
    group = tl.program_id(0).to(tl.int64) // GROUP
    rank = tl.program_id(0) % GROUP
    counter = counter_ptr + group
    target = 0
    n_blocks = n // TILE
    n_chunks = (n + CHUNK - 1) // CHUNK
    panel = tl.arange(0, PANEL)
    blocks = tl.arange(0, BLOCKS)
    SUMS: tl.constexpr = 2 * PANEL + 2

    for m in range(group, batch, n_groups):
        a = a_ptr + m * n * n
        v_ptr = work_ptr + m * work_stride
        w_ptr = v_ptr + PANEL * n
        v_rows = w_ptr + PANEL * n
        w_rows = v_rows + PANEL * n
        column_ptr = w_rows + PANEL * n
        part_ptr = column_ptr + n
        sums = part_ptr + BLOCKS * n
        shares = sums + tl.arange(0, GROUP) * SUMS
        own = sums + rank * SUMS

        tail = tl.zeros([CHUNK], dtype=dtype)
        for q in range(rank, n_chunks, GROUP):
            c = q * CHUNK + tl.arange(0, CHUNK)
            column = tl.load(a + c, mask=c < n, other=0.0)
            tl.store(column_ptr + c, column, mask=c < n)
            tail += tl.where(c > 1, column * column, 0.0)
        tl.store(own + panel, tl.zeros([PANEL], dtype=dtype))
        tl.store(own + PANEL + panel, tl.zeros([PANEL], dtype=dtype))
        tl.store(own + 2 * PANEL, tl.sum(tail))
        if rank == 0:
            tl.store(d_ptr + m * n, tl.load(a))
        target += GROUP
        _barrier(counter, target, GROUP)

        for k in range(n - 1):
            j = k % PANEL
            done = panel < j
            # The reflector I - tau v vᵀ that maps the column below the diagonal to (beta, 0, ..., 0), with v[k + 1] = 1.
            alpha = tl.load(column_ptr + k + 1)
            squares = tl.sum(tl.load(shares + 2 * PANEL))
            beta, tau, inverse = reflector_scalars(alpha, squares, negligible)
            if rank == 0:
                tl.store(e_ptr + m * n + k, beta)
            v_head = tl.load(v_rows + (k + 1) * PANEL + panel, mask=done, other=0.0)
            w_head = tl.load(w_rows + (k + 1) * PANEL + panel, mask=done, other=0.0)
            dot_v = tl.sum(tl.load(shares[:, None] + panel[None, :]), 0) * inverse + v_head
            dot_w = tl.sum(tl.load(shares[:, None] + PANEL + panel[None, :]), 0) * inverse + w_head
            start = k // CHUNK
            for q in range(start + (rank - start % GROUP + GROUP) % GROUP, n_chunks, GROUP):
                c = q * CHUNK + tl.arange(0, CHUNK)
                v = tl.load(column_ptr + c, mask=c < n, other=0.0) * inverse
                v = tl.where(c > k + 1, v, tl.where(c == k + 1, 1.0, 0.0))
                tl.store(v_ptr + j * n + c, v, mask=c < n)
                tl.store(v_rows + c * PANEL + j, v, mask=c < n)

            first = (k + 1) // TILE
            form_r = tl.zeros([TILE], dtype=dtype)
            form_c = tl.zeros([TILE], dtype=dtype)
            # Blocks row by row, an even run of them for each program; row products are summed over lanes once per row of a run.
            units = (n_blocks - first) * (n_blocks - first + 1) // 2
            run = (units + GROUP - 1) // GROUP
            u = rank * run
            end = tl.minimum(u + run, units)
            bi, bj = _block(tl.maximum(units - 1 - u, 0), n_blocks - 1)
            while u < end:
                r = bi * TILE + tl.arange(0, TILE)
                v_r = _reflector(column_ptr, r, k, inverse)
                rows = tl.zeros([TILE, TILE], dtype=dtype)
                stop = tl.minimum(n_blocks, bj + end - u)
                for b in tl.range(bj, stop, num_stages=STAGES):
                    c = b * TILE + tl.arange(0, TILE)
                    v_c = _reflector(column_ptr, c, k, inverse)
                    tile = tl.load(a + r[:, None] * n + c[None, :], mask=(r > k)[:, None], other=0.0)
                    rows += tile * v_c[None, :]
                    col = tl.sum(tile * v_r[:, None], 0)
                    tl.store(part_ptr + bi * n + c, col, mask=b != bi)
                    form_c += tl.where(b != bi, col * v_c, 0.0)
                row = tl.sum(rows, 1)
                tl.store(part_ptr + bj * n + r, row)
                form_r += row * v_r
                u += stop - bj
                bi += 1
                bj = bi
            tl.store(own + 2 * PANEL + 1, tl.sum(form_r) + tl.sum(form_c))
            target += GROUP
            _barrier(counter, target, GROUP)

            # w = tau y - (tau² yᵀv / 2) v with y = A v - V (Wᵀv) - W (Vᵀv); then column k + 1 of A - V Wᵀ - W Vᵀ.
            half = 0.5 * tau * tau * (tl.sum(tl.load(shares + 2 * PANEL + 1)) - 2 * tl.sum(dot_v * dot_w))
            ahead = (blocks >= first) & (blocks < n_blocks) & ((blocks - first) % run == 0)
            y_head = tl.sum(tl.load(part_ptr + blocks * n + k + 1, mask=ahead, other=0.0))
            y_head -= tl.sum(v_head * dot_w + w_head * dot_v)
            new_head = tau * y_head - half
            next_v = tl.zeros([PANEL], dtype=dtype)
            next_w = tl.zeros([PANEL], dtype=dtype)
            last_v = tl.zeros([CHUNK], dtype=dtype)
            last_w = tl.zeros([CHUNK], dtype=dtype)
            tail = tl.zeros([CHUNK], dtype=dtype)
            start = (k + 1) // CHUNK
            for q in range(start + (rank - start % GROUP + GROUP) % GROUP, n_chunks, GROUP):
                c = q * CHUNK + tl.arange(0, CHUNK)
                inside = (c < n)[:, None]
                old_v = tl.load(v_rows + c[:, None] * PANEL + panel[None, :], mask=inside & done[None, :], other=0.0)
                old_w = tl.load(w_rows + c[:, None] * PANEL + panel[None, :], mask=inside & done[None, :], other=0.0)
                # Column products of the rows of blocks above, and row products where a run, or the row of blocks, began.
                block = (c // TILE)[:, None]
                used = (blocks >= first)[None, :] & (blocks[None, :] <= block)
                if GROUP > 1:
                    before = (block - first) * n_blocks - (block * (block - 1) - first * (first - 1)) // 2
                    starts = (before + blocks[None, :] - block) % run == 0
                    used |= (blocks[None, :] > block) & (blocks < n_blocks)[None, :] & starts
                y = tl.sum(tl.load(part_ptr + blocks[None, :] * n + c[:, None], mask=inside & used, other=0.0), 1)
                y -= tl.sum(old_v * dot_w[None, :] + old_w * dot_v[None, :], 1)
                v = tl.load(v_ptr + j * n + c, mask=c < n, other=0.0)
                w = tl.where(c > k, tau * y - half * v, 0.0)
                tl.store(w_ptr + j * n + c, w, mask=c < n)
                tl.store(w_rows + c * PANEL + j, w, mask=c < n)
                column = tl.load(a + (k + 1) * n + c, mask=c < n, other=0.0) - (v * new_head + w)
                column -= tl.sum(old_v * w_head[None, :] + old_w * v_head[None, :], 1)
                tl.store(column_ptr + c, column, mask=c < n)
                tl.store(d_ptr + m * n + c, column, mask=c == k + 1)
                column = tl.where(c > k + 2, column, 0.0)
                tail += column * column
                last_v += column * v
                last_w += column * w
                next_v += tl.sum(old_v * column[:, None], 0)
                next_w += tl.sum(old_w * column[:, None], 0)
            fresh = j == PANEL - 1
            next_v = tl.where(fresh, 0.0, tl.where(panel == j, tl.sum(last_v), next_v))
            next_w = tl.where(fresh, 0.0, tl.where(panel == j, tl.sum(last_w), next_w))
            tl.store(own + panel, next_v)
            tl.store(own + PANEL + panel, next_w)
            tl.store(own + 2 * PANEL, tl.sum(tail))
            target += GROUP
            _barrier(counter, target, GROUP)

            if fresh:
                for u in tl.range(rank, units, GROUP, num_stages=STAGES):
                    bi, bj = _block(units - 1 - u, n_blocks - 1)
                    r = bi * TILE + tl.arange(0, TILE)
                    c = bj * TILE + tl.arange(0, TILE)
                    spot = a + r[:, None] * n + c[None, :]
                    tile = tl.load(spot, mask=(r > k)[:, None], other=0.0)
                    for i in range(PANEL):
                        v_r = tl.load(v_ptr + i * n + r)
                        w_r = tl.load(w_ptr + i * n + r)
                        v_c = tl.load(v_ptr + i * n + c)
                        w_c = tl.load(w_ptr + i * n + c)
                        tile -= v_r[:, None] * w_c[None, :]
                        tile -= w_r[:, None] * v_c[None, :]
                    tl.store(spot, tile, mask=(r > k)[:, None])
                target += GROUP
                _barrier(counter, target, GROUP)


@kernel
def _count(x, d, e2, n, tiny):
    """Number of eigenvalues of the tridiagonal below x, by the signs of the pivots of T - x."""
    count = tl.zeros_like(x).to(tl.int32)
    q = tl.zeros_like(x) + 1.0
    for i in range(n):
        q = (tl.load(d + i) - x) - tl.load(e2 + i) / q
        q = tl.where(tl.abs(q) < tiny, -tiny, q)
        count += (q < 0).to(tl.int32)
    return count


@partial(kernel, plain=["n", "steps"])
def _bisect_roots(
    d_ptr, e_ptr, out_ptr, e2_ptr, count_ptr, n, steps, tiny,
    LANES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Square roots of the eigenvalues of positive semidefinite tridiagonals, descending, by bisection on the root."""
    m = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d, e = d_ptr + m * n, e_ptr + m * n
    e2 = e2_ptr + (m * tl.num_programs(1) + block) * n
    counts = count_ptr + (m * tl.num_programs(1) + block) * LANES

    i = tl.arange(0, SIZE)
    below = tl.abs(tl.load(e + i - 1, mask=(i > 0) & (i < n), other=0.0))
    above = tl.abs(tl.load(e + i, mask=i < n - 1, other=0.0))
    top = tl.sqrt(tl.max(tl.where(i < n, tl.abs(tl.load(d + i, mask=i < n, other=0.0)) + below + above, 0.0), 0))
    tl.store(e2 + i, below * below, mask=i < n)
    tl.debug_barrier()

    # One pass over a grid of points brackets all eigenvalues as log2(LANES) steps of bisection would.
    lane = tl.arange(0, LANES)
    width = top * (1.0 / LANES)
    point = (lane + 1) * width
    tl.store(counts + lane, _count(point * point, d, e2, n, tiny))
    tl.debug_barrier()
    index = n - 1 - (block * LANES + lane)  # this lane's eigenvalue has so many below it
    low = tl.zeros([LANES], dtype=tl.int32)
    step = LANES // 2
    while step > 0:
        ahead = tl.load(counts + low + step - 1)
        low = tl.where(ahead <= index, low + step, low)
        step = step // 2
    left = low * width
    right = left + width
    for _ in range(steps):
        middle = 0.5 * (left + right)
        below_middle = _count(middle * middle, d, e2, n, tiny) <= index
        left = tl.where(below_middle, middle, left)
        right = tl.where(below_middle, right, middle)
    tl.store(out_ptr + m * n + block * LANES + lane, 0.5 * (left + right), mask=index >= 0)


def tridiagonalize(matrices: Float[Tensor, "N n n"]) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N n"]]:
    """Reduce symmetric matrices to tridiagonal ones with the same eigenvalues.

    Args:
        matrices: finite, float32 or float64, of magnitude near 1, n a multiple of `TILE`; destroyed.

    Returns:
        Diagonals, and off-diagonals whose last entry is 0.
    """
    batch, n = matrices.shape[:2]
    blocks = n // TILE
    single = matrices.dtype == torch.float32
    device = torch.cuda.get_device_properties(matrices.device)
    # What one program takes: registers allow four at a time in float32 and two in float64, if shared memory has room for its blocks.
    resident = min(4 if single else 2, device.shared_memory_per_multiprocessor // ((36 if single else 70) << 10))
    slots = max(resident, 1) * device.multi_processor_count
    group = 1  # 4, 16 or 64 where programs would idle: each version of the kernel takes seconds to compile
    while batch * group * 2 <= slots and group * 4 <= min(64, blocks * (blocks + 1) // 4):
        group *= 4
    groups = batch if group == 1 else min(batch, slots // group)
    panel = 8 if n <= 1024 else 16
    padded_blocks = power_of_two(blocks)
    stride = (4 * panel + 1 + padded_blocks) * n + -(-group * (2 * panel + 2) // 64) * 64
    diagonal = matrices.new_empty(batch, n)
    off_diagonal = matrices.new_zeros(batch, n)
    work = matrices.new_empty(batch * stride)
    counter = torch.zeros(groups, dtype=torch.int32, device=matrices.device)
    # Programs of a group wait for each other, so all must run at once: a launch that cannot promise it fails instead of hanging.
    options: dict[str, Any] = {"launch_cooperative_grid": True} if group > 1 else {}
    if single:
        options["maxnreg"] = 128
    _tridiagonalize[(groups * group,)](
        matrices, diagonal, off_diagonal, work, counter, n, batch, groups, stride, NEGLIGIBLE, GROUP=group, PANEL=panel, TILE=TILE, CHUNK=128,
        BLOCKS=padded_blocks, STAGES=3, num_warps=4, **options,
    )  # fmt: skip
    return diagonal, off_diagonal


def bisect_roots(diagonal: Float[Tensor, "N n"], off_diagonal: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    """Square roots of the eigenvalues of positive semidefinite tridiagonal matrices.

    Args:
        diagonal: diagonals.
        off_diagonal: off-diagonals; the last entry is not read.

    Returns:
        Roots, descending, each within 2^-23 (float32) or 2^-30 (float64) of the largest; negative eigenvalues give about 0.
    """
    batch, n = diagonal.shape
    size = max(power_of_two(n), 32)
    lanes = min(size, 512)
    blocks = -(-n // lanes)
    steps = (23 if diagonal.dtype == torch.float32 else 30) - (lanes.bit_length() - 1)
    out = torch.empty_like(diagonal)
    e2 = torch.empty(batch * blocks, n, dtype=diagonal.dtype, device=diagonal.device)
    counts = torch.empty(batch * blocks, lanes, dtype=torch.int32, device=diagonal.device)
    _bisect_roots[(batch, blocks)](
        diagonal,
        off_diagonal,
        out,
        e2,
        counts,
        n,
        steps,
        SMALLEST_PIVOT,
        LANES=lanes,
        SIZE=size,
        num_warps=max(lanes // 64, 1),
    )
    return out
