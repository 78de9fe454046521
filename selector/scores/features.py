"""Matrices of cheap features, of which a linear fit needs two products: hashed words of texts, and embeddings."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int32, Int64

BUCKETS = 1 << 18
"""Buckets of the hash; at 100 thousand different words and pairs a third of them share one."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@runtime_checkable
class Features(Protocol):
    """N rows of C features."""

    def __len__(self) -> int:
        """N."""
        ...

    def dot(self, weights: Float[np.ndarray, " C"]) -> Float64[np.ndarray, " N"]:
        """Product with a vector."""
        ...

    def transposed_dot(self, rows: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " C"]:
        """Product of the transpose with a vector."""
        ...

    def take(self, rows: Int[np.ndarray, " M"]) -> Features:
        """Some of the rows."""
        ...

    def column_scale(self) -> Float64[np.ndarray, " C"]:
        """How much each column should count, learned from these rows."""
        ...

    def scaled(self, scale: Float64[np.ndarray, " C"]) -> Features:
        """Columns multiplied by a scale, rows brought to comparable length."""
        ...

    def mean_square(self) -> float:
        """Mean squared length of a row."""
        ...


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A dense matrix, used as it is."""

    values: Float[np.ndarray, "N C"]
    """One embedding per row."""

    def __len__(self) -> int:
        return len(self.values)

    def dot(self, weights: Float[np.ndarray, " C"]) -> Float64[np.ndarray, " N"]:
        return (self.values @ weights).astype(np.float64)

    def transposed_dot(self, rows: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " C"]:
        return (rows @ self.values).astype(np.float64)

    def take(self, rows: Int[np.ndarray, " M"]) -> Embeddings:
        return Embeddings(self.values[rows])

    def column_scale(self) -> Float64[np.ndarray, " C"]:
        return np.ones(self.values.shape[1])

    def scaled(self, scale: Float64[np.ndarray, " C"]) -> Embeddings:
        return Embeddings(self.values * scale)

    def mean_square(self) -> float:
        return float(np.square(self.values).sum(axis=1).mean())


@dataclass(frozen=True, eq=False)
class HashedWords:
    """A sparse matrix by rows: row n owns the entries `indptr[n]:indptr[n + 1]`."""

    indptr: Int64[np.ndarray, " _"]
    """[N + 1] where each row begins, and the end of the last."""
    columns: Int32[np.ndarray, " E"]
    """Bucket of each entry."""
    values: Float32[np.ndarray, " E"]
    """Value of each entry."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> HashedWords:
        """Log counts of words, signs and pairs of neighbours among them.

        Args:
            texts: one for each row.
        """
        bucket_of: dict[str, int] = {}
        indptr, columns, values = [0], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for text in texts:
            words = _TOKEN.findall(text.lower())
            grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
            for gram in grams:
                if gram not in bucket_of:
                    bucket_of[gram] = zlib.crc32(gram.encode()) % BUCKETS
            found, counts = np.unique(np.array([bucket_of[gram] for gram in grams], np.int32), return_counts=True)
            columns.append(found)
            values.append(np.log1p(counts).astype(np.float32))
            indptr.append(indptr[-1] + len(found))
        return cls(np.array(indptr), np.concatenate(columns), np.concatenate(values))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def dot(self, weights: Float[np.ndarray, " C"]) -> Float64[np.ndarray, " N"]:
        return np.bincount(self._rows(), weights=self.values * weights[self.columns], minlength=len(self))

    def transposed_dot(self, rows: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " C"]:
        return np.bincount(self.columns, weights=self.values * rows[self._rows()], minlength=BUCKETS)

    def take(self, rows: Int[np.ndarray, " M"]) -> HashedWords:
        counts = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        entries = np.arange(indptr[-1]) + np.repeat(self.indptr[:-1][rows] - indptr[:-1], counts)
        return HashedWords(indptr, self.columns[entries], self.values[entries])

    def column_scale(self) -> Float64[np.ndarray, " C"]:
        """Inverse document frequency."""
        return np.log((1 + len(self)) / (1 + np.bincount(self.columns, minlength=BUCKETS))) + 1

    def scaled(self, scale: Float64[np.ndarray, " C"]) -> HashedWords:
        weighted = self.values * scale[self.columns]
        squares = np.bincount(self._rows(), weights=weighted**2, minlength=len(self))
        lengths = np.sqrt(np.where(squares > 0, squares, 1))
        return replace(self, values=(weighted / lengths[self._rows()]).astype(np.float32))

    def mean_square(self) -> float:
        return float(np.square(self.values, dtype=np.float64).sum() / max(len(self), 1))

    def _rows(self) -> Int64[np.ndarray, " E"]:
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))
