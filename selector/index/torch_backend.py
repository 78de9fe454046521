"""Exact search by matrix products in torch: the engine of GPUs without faiss-gpu, and of machines without FAISS."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float32

from selector.index.backend import Candidates

ROWS = 1 << 18
"""Rows of the pool that one matrix product takes."""

QUERIES = 1 << 10
"""Queries that one matrix product takes."""


class TorchFlat:
    """Exact search over an array, held on the device.

    Args:
        vectors: [N, d] the pool.
        device: a torch device.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N d"], device: str = "cpu") -> None:
        self._device = torch.device(device)
        # a copy: torch refuses to promise that it will not write to a read-only memory map
        self._vectors = torch.tensor(np.asarray(vectors), device=self._device)
        self._squares = self._vectors.square().sum(dim=1)

    @property
    def name(self) -> str:
        """Engine and version, for descriptions."""
        return f"torch {torch.__version__} on {self._device.type}"

    def __len__(self) -> int:
        return len(self._vectors)

    def candidates(
        self, queries: Float32[np.ndarray, "Q d"], k: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> Candidates:
        """Propose the k members nearest to each query.

        Args:
            queries: contiguous rows.
            k: how many to propose; fewer come where fewer are allowed.
            allowed: which members may be proposed; all when None.
        """
        rows, pool, squares = None, self._vectors, self._squares
        if allowed is not None:
            rows = torch.from_numpy(np.flatnonzero(allowed)).to(self._device)
            pool, squares = pool[rows], squares[rows]
        k = min(k, len(pool))
        if k == 0 or len(queries) == 0:
            return Candidates(np.zeros((len(queries), k), np.int64), np.full(len(queries), k))
        parts = []
        for part in torch.tensor(queries, device=self._device).split(QUERIES):
            positions = _nearest(part, pool, squares, k)
            parts.append(positions if rows is None else rows[positions])
        return Candidates(torch.cat(parts).cpu().numpy(), np.full(len(queries), k))


def _nearest(queries: torch.Tensor, pool: torch.Tensor, squares: torch.Tensor, k: int) -> torch.Tensor:
    """Positions [q, k] of the nearest rows of a pool; a query's own length shifts all its distances alike and is left out."""
    best = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(pool), ROWS):
        rows = slice(start, start + ROWS)
        distances = torch.addmm(squares[rows], queries, pool[rows].T, alpha=-2)
        near, index = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
        best, order = torch.cat([best, near], dim=1).sort(dim=1, stable=True)
        positions = torch.cat([positions, index + start], dim=1).gather(1, order)
        best, positions = best[:, :k], positions[:, :k]
    return positions
