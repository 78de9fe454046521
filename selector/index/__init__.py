"""The index: which samples pull the model the same way, and which the other. Vectors in, sample ids out."""

from selector.index.filters import Filter
from selector.index.gradient_index import GradientIndex
from selector.index.result import SearchResult

__all__ = ["Filter", "GradientIndex", "SearchResult"]
