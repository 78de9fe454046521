"""Near-duplicates in a large pool, exactly: cells with a bisector margin, and union-find instead of lists of pairs.

Take any centroids and put each vector in the cell of its nearest. A pair within a distance r that falls into two cells a
and b lies on both sides of the plane that bisects them, so one of the two is within r/2 of that plane. A vector x
therefore also visits every cell b with

    ‖x − c_b‖² − ‖x − c_a‖² <= r ‖c_a − c_b‖          (left side: 2 ‖c_a − c_b‖ times the distance to the plane)

and each pair meets in the cell of one of them. Nothing is lost, whatever the centroids; good ones (k-means) only keep cells
small and visits few. A million vectors thus take about a thousand products of small matrices, and those only over the
leading dimensions: distances there are never longer, so cells and pairs that hold in them lose nothing either.

Template-heavy data would give pairs without number. Each cell hands on at most one link per vector, to its component, and
a crowded cell first joins whole balls around a few of its vectors, after which pairs inside a component are not compared.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from selector.index.pairs import ROUNDING, SETTLED, propose_pairs, settle_pairs, tensor
from selector.spectra.threads import side_by_side

PER_CELL = 500
"""Vectors per cell that are aimed at."""

TRAINED_ON = 32
"""Vectors per cell that k-means sees."""

ITERATIONS = 5
"""Rounds of k-means; centroids need not be good, only better than random."""

CROWDED = 8192
"""Vectors in a cell from which balls are joined first."""

BALLS = 32
"""Most balls that are joined."""

ELEMENTS = 1 << 22
"""Most distances to centroids that are held at once."""

CELLS = 256
"""Cells whose links are collected before they are joined."""

BLOCK, COLUMNS = 512, 8192
"""Rows and columns of a cell that are compared at once."""


def duplicate_labels(
    vectors: Float32[np.ndarray, "N R"], radius: float, *, leading: int, device: str = "cpu", seed: int = 0
) -> Int64[np.ndarray, " N"]:
    """Clusters of vectors that a chain of pairs within a distance joins.

    Args:
        vectors: the pool; may be a memory map.
        radius: largest Euclidean distance of a pair.
        leading: dimensions that propose pairs; the answer does not depend on it.
        device: a torch device for the products.
        seed: of the centroids; the answer does not depend on it.

    Returns:
        For each vector the smallest position in its cluster.
    """
    count = len(vectors)
    labels = np.arange(count)
    if count < 2:
        return labels
    centroids = _centroids(vectors[:, :leading], radius, device, seed)
    with side_by_side() as pool:
        positions, bounds, members = _cells(vectors[:, :leading], centroids, radius, pool)

        def links(cell: int) -> Int64[np.ndarray, "2 E"]:
            inside = positions[bounds[cell] : bounds[cell + 1]]
            local = _components(tensor(vectors[inside], device), int(members[cell]), radius, leading)
            joined = np.flatnonzero(local != np.arange(len(local)))
            return np.stack([inside[joined], inside[local[joined]]])

        filled = np.flatnonzero(members).tolist()
        for start in range(0, len(filled), CELLS):
            found = np.concatenate(list(pool.map(links, filled[start : start + CELLS])), axis=1)
            join(labels, found[0], found[1])
    return labels


def join(labels: Int64[np.ndarray, " N"], i: Int64[np.ndarray, " E"], j: Int64[np.ndarray, " E"]) -> None:
    """Union-find over arrays: merge the components of each pair, in place.

    Args:
        labels: the smallest position in the component of each position.
        i: one end of each pair.
        j: the other end.
    """
    while True:
        a, b = labels[i], labels[j]
        apart = a != b
        if not apart.any():
            return
        i, j, a, b = i[apart], j[apart], a[apart], b[apart]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(jumped := labels[labels], labels):
            labels[:] = jumped


def _centroids(vectors: Float32[np.ndarray, "N R"], radius: float, device: str, seed: int) -> Float32[Tensor, "C R"]:
    """K-means on a random part, then thinned: cells narrower than the radius would all visit each other."""
    count = len(vectors)
    cells = max(1, count // PER_CELL)
    part = np.random.default_rng(seed).choice(count, min(count, TRAINED_ON * cells), replace=False)
    sample = tensor(vectors[np.sort(part)], device)
    centroids = sample[torch.from_numpy(np.argsort(part)[:cells]).to(device)]
    for _ in range(ITERATIONS if cells > 1 else 0):
        nearest = torch.addmm(centroids.square().sum(dim=1), sample, centroids.T, alpha=-2).argmin(dim=1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, sample)
        sizes = torch.bincount(nearest, minlength=cells)[:, None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    gaps = torch.cdist(centroids, centroids).cpu().numpy()
    kept: list[int] = []
    for cell in range(cells):
        if not kept or gaps[cell, kept].min() > radius:
            kept.append(cell)
    return centroids[torch.tensor(kept, device=device)]


def _cells(
    vectors: Float32[np.ndarray, "N d"], centroids: Float32[Tensor, "C d"], radius: float, pool: Executor
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " _"], Int64[np.ndarray, " C"]]:
    """Positions cell by cell, its members first and then its visitors; [C + 1] bounds of the cells; members of each."""
    squares = centroids.square().sum(dim=1)
    reach = radius * torch.cdist(centroids, centroids)
    step = max(1, ELEMENTS // len(centroids))

    def assign(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        block = tensor(vectors[start : start + step], str(centroids.device))
        distances = torch.addmm(squares, block, centroids.T, alpha=-2)
        near, home = distances.min(dim=1)
        slack = 2 * ROUNDING * float(block.square().sum(dim=1).max() + squares.max())
        row, cell = np.nonzero((distances <= reach[home].add_((near + slack)[:, None])).cpu().numpy())
        return row + start, cell, cell != home.cpu().numpy()[row]

    parts = pool.map(assign, range(0, len(vectors), step))
    position, cell, visitor = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((visitor, cell))
    bounds = np.searchsorted(cell[order], np.arange(len(centroids) + 1))
    return position[order], bounds, np.bincount(cell[~visitor], minlength=len(centroids))


def _components(x: Float32[Tensor, "T R"], members: int, radius: float, leading: int) -> Int64[np.ndarray, " T"]:
    """Components among the vectors of a cell, by pairs of which at least one is a member; members come first."""
    labels = np.arange(len(x))
    order = labels.copy()
    if len(x) > CROWDED:
        _join_balls(x, labels, radius, leading)
        order = np.lexsort((labels, order >= members))
    for start in range(0, members, BLOCK):
        rows, columns = order[start : min(start + BLOCK, members)], order[start:]
        if len(x) > CROWDED and (labels[rows] == labels[rows[0]]).all():
            columns = columns[labels[columns] != labels[rows[0]]]
        for left in range(0, len(columns), COLUMNS):
            _join_close(x, labels, rows, columns[left : left + COLUMNS], radius, leading)
    return labels


def _join_close(
    x: Float32[Tensor, "T R"],
    labels: Int64[np.ndarray, " T"],
    rows: Int64[np.ndarray, " A"],
    columns: Int64[np.ndarray, " B"],
    radius: float,
    leading: int,
) -> None:
    """Join every close pair of a block; pairs that others have joined meanwhile are not settled."""
    a, b = (x[torch.from_numpy(part).to(x.device)] for part in (rows, columns))
    i, j = propose_pairs(a, b, radius, leading)
    while len(i):
        apart = labels[rows[i]] != labels[columns[j]]
        i, j = i[apart], j[apart]
        close = settle_pairs(a, b, i[:SETTLED], j[:SETTLED]) <= radius**2
        join(labels, rows[i[:SETTLED][close]], columns[j[:SETTLED][close]])
        i, j = i[SETTLED:], j[SETTLED:]


def _join_balls(x: Float32[Tensor, "T R"], labels: Int64[np.ndarray, " T"], radius: float, leading: int) -> None:
    """Join everything within the radius of a few vectors, each outside the balls before it."""
    outside = np.ones(len(x), dtype=bool)
    for _ in range(BALLS):
        left = np.flatnonzero(outside)
        if len(left) == 0:
            return
        center = x[left[0] : left[0] + 1]
        i, ball = propose_pairs(center, x, radius, leading)
        ball = ball[settle_pairs(center, x, i, ball) <= radius**2]
        outside[ball] = False
        join(labels, np.full(len(ball), left[0]), ball)
