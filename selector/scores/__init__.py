"""One number per sample: aggregation over layers, direction, length control, and the table that keeps them."""

from selector.scores.aggregate import Aggregation, aggregate
from selector.scores.combine import combine
from selector.scores.distill import Distilled
from selector.scores.features import Embeddings, HashedWords
from selector.scores.from_store import HIGHER_FIRST, available, score
from selector.scores.length import LengthControl, load_control
from selector.scores.statistics import LengthCorrelation, correlations, length_correlation, spearman, spearman_interval
from selector.scores.table import read_provenance, read_scores, write_scores

__all__ = [
    "HIGHER_FIRST",
    "Aggregation",
    "Distilled",
    "Embeddings",
    "HashedWords",
    "LengthControl",
    "LengthCorrelation",
    "aggregate",
    "available",
    "combine",
    "correlations",
    "length_correlation",
    "load_control",
    "read_provenance",
    "read_scores",
    "score",
    "spearman",
    "spearman_interval",
    "write_scores",
]
