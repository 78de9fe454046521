"""Spectra of weight gradients: singular values from factors, measures of them, similarities and sketches."""

from selector.spectra.cores import Core, solve
from selector.spectra.factors import Precision, begin_reduction, reduce_factors, singular_values
from selector.spectra.measures import (
    Measure,
    effective_rank,
    frobenius_norm,
    measures,
    nuclear_norm,
    spectral_norm,
    stable_rank,
)
from selector.spectra.similarity import cosines, inner_products, pairwise_inner_products
from selector.spectra.sketch import SketchConfig, join, sketch

__all__ = [
    "Core", "Measure", "Precision", "SketchConfig", "begin_reduction", "cosines", "effective_rank", "frobenius_norm",
    "inner_products", "join", "measures", "nuclear_norm", "pairwise_inner_products", "reduce_factors", "singular_values",
    "sketch", "solve", "spectral_norm", "stable_rank",
]  # fmt: skip
