"""All pairs within a distance, exactly: matrix products propose, differences decide.

The distance over the leading dimensions is never longer than the whole one, so a product over those alone loses no pair.
With the squared lengths as two more columns it gives −‖x − y‖²/2 at once, up to rounding, for which the bound is widened;
what it proposes is settled by the difference of the whole vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

ROUNDING = 1e-5
"""Bound on the error of a squared distance from matrix products, relative to the squared lengths; 80 float32 units."""

ELEMENTS = 1 << 22
"""Most products that are held at once."""

SETTLED = 1 << 15
"""Pairs whose differences are held at once."""


def tensor(vectors: np.ndarray, device: str) -> Tensor:
    """Copy vectors to a device; a copy, as torch does not take read-only memory maps.

    Args:
        vectors: [N, D] float32.
        device: a torch device.
    """
    return torch.tensor(np.asarray(vectors), device=device)


def propose_pairs(
    x: Float32[Tensor, "N R"], y: Float32[Tensor, "M R"], radius: float, leading: int
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"]]:
    """Rows of x and y that may lie within a distance: all that do, and few others.

    Args:
        x: N x M products are held at once, so keep it to a block.
        y: on the same device.
        radius: largest distance.
        leading: dimensions that are looked at.

    Returns:
        Row numbers in x and in y, ordered by x, then y.
    """
    if len(x) == 0 or len(y) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    x, y = x[:, :leading], y[:, :leading]
    lengths, others = x.square().sum(dim=1, keepdim=True), y.square().sum(dim=1, keepdim=True)
    one, another = torch.ones_like(lengths), torch.ones_like(others)
    products = torch.cat([x, lengths / -2, one], dim=1) @ torch.cat([y, another, others / -2], dim=1).T
    floor = -(radius**2 + ROUNDING * float(lengths.max() + others.max())) / 2
    rows = torch.nonzero(products.amax(dim=1) >= floor).flatten()
    i, j = np.nonzero((products[rows] >= floor).cpu().numpy())
    return rows.cpu().numpy()[i], j


def settle_pairs(
    x: Float32[Tensor, "N R"], y: Float32[Tensor, "M R"], i: Int64[np.ndarray, " E"], j: Int64[np.ndarray, " E"]
) -> Float32[np.ndarray, " E"]:
    """Squared distances of pairs, from the differences of the whole vectors.

    Args:
        x: first vectors.
        y: second vectors, on the same device.
        i: rows of x.
        j: rows of y.
    """
    rows, columns = (torch.from_numpy(part).to(x.device) for part in (i, j))
    parts = [
        (x[a] - y[b]).square_().sum(dim=1) for a, b in zip(rows.split(SETTLED), columns.split(SETTLED), strict=True)
    ]
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.float32)


def within(
    queries: Float32[np.ndarray, "Q R"],
    vectors: Float32[np.ndarray, "N R"],
    radius: float,
    *,
    leading: int,
    device: str,
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
    """Every member within a distance of each query, by a scan of the whole pool.

    Args:
        queries: query vectors.
        vectors: the pool.
        radius: largest distance.
        leading: dimensions that propose.
        device: a torch device.

    Returns:
        Queries, positions and squared distances of all pairs; by query, then distance, then position.
    """
    asked = tensor(queries, device)
    step = max(1, ELEMENTS // max(1, len(queries)))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for start in range(0, len(vectors) if len(queries) else 0, step):
        block = tensor(vectors[start : start + step], device)
        i, j = propose_pairs(asked, block, radius, leading)
        squares = settle_pairs(asked, block, i, j)
        close = squares <= radius**2
        found.append((i[close], j[close] + start, squares[close]))
    row, position, squares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((position, squares, row))
    return row[order], position[order], squares[order]
