"""Gradient-based data selection for post-training.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selector.config import ScoreConfig as ScoreConfig
    from selector.index import GradientIndex as GradientIndex
    from selector.sampling import SelectionSampler as SelectionSampler
    from selector.scorer import load_model as load_model
    from selector.scorer import score_dataset as score_dataset
    from selector.scores import score as score
    from selector.selecting import select as select
    from selector.selection import Selection as Selection
    from selector.store import FeatureStore as FeatureStore
    from selector.types import Scores as Scores

_HOME = {
    "FeatureStore": "selector.store",
    "GradientIndex": "selector.index",
    "ScoreConfig": "selector.config",
    "Scores": "selector.types",
    "Selection": "selector.selection",
    "SelectionSampler": "selector.sampling",
    "load_model": "selector.scorer",
    "score": "selector.scores",
    "score_dataset": "selector.scorer",
    "select": "selector.selecting",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("gradient-selector")
    if name not in _HOME:
        # submodules, such as selector.spectra, are loaded on first use as well
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name == f"{__name__}.{name}":
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
            raise
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
