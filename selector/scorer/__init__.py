"""The one room where data, gradients, spectra and store meet: a data set and a model in, a feature store out."""

from selector.scorer.explain import check_explainable, explain
from selector.scorer.models import load_model
from selector.scorer.run import estimate_run, score_dataset

__all__ = ["check_explainable", "estimate_run", "explain", "load_model", "score_dataset"]
