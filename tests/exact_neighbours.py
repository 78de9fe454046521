"""Neighbours by comparing all pairs: the plain reference for policies that ask an index."""

from __future__ import annotations

import numpy as np

from selector.neighbours import NeighbourLists


class ExactNeighbours:
    """Cosine between all pairs of a small pool."""

    def __init__(self, vectors: np.ndarray) -> None:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.unit = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.unit)

    def similarity(self) -> np.ndarray:
        return self.unit @ self.unit.T

    def neighbours(self, positions: np.ndarray, k: int) -> NeighbourLists:
        similarity = self.unit[positions] @ self.unit.T
        similarity[np.arange(len(positions)), positions] = -np.inf
        return self._lists(similarity, min(k, len(self) - 1))

    def neighbours_of(self, vectors: np.ndarray, k: int) -> NeighbourLists:
        return self._lists(ExactNeighbours(vectors).unit @ self.unit.T, min(k, len(self)))

    def graph(self, k: int) -> NeighbourLists:
        return self.neighbours(np.arange(len(self)), k)

    def duplicates(self, threshold: float) -> np.ndarray:
        labels = np.arange(len(self))
        for a, b in zip(*np.nonzero(self.similarity() >= threshold), strict=True):
            low, high = sorted((labels[a], labels[b]))
            labels[labels == high] = low
        return labels

    @staticmethod
    def _lists(similarity: np.ndarray, k: int) -> NeighbourLists:
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : max(k, 0)]
        values = np.take_along_axis(similarity, order, axis=1)
        return NeighbourLists(np.arange(len(order) + 1) * order.shape[1], order.ravel(), values.ravel())
