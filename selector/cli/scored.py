"""What `selector select` and `selector predict` have in common: how a store becomes one score per sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from selector.cli.command import Command
from selector.errors import StoreError
from selector.scores.aggregate import Aggregation
from selector.store.schema import MANIFEST

if TYPE_CHECKING:
    from selector.store import FeatureStore
    from selector.types import Scores


@dataclass(frozen=True, kw_only=True)
class ScoredCommand(Command):
    """Base of the commands that begin with the scores of a store."""

    store: Annotated[Path, Positional]
    """Directory of the feature store."""
    by: str | None = None
    """What to score by: effective_rank, nuclear_norm, frobenius_norm, spectral_norm, stable_rank, layer_profile_difference,
    loss, perplexity, n_tokens, prompt_tokens, response_tokens, random, or a scorer that the store was made with."""
    control: Literal["length", "bins", "per-token", "none"] = "length"
    """How length is taken out of the score; length is the residual of a spline."""
    prefer: Literal["auto", "high", "low"] = "auto"
    """Which end of the score comes first; auto is high for ranks and low for norms and loss."""
    aggregation: Aggregation = field(default_factory=Aggregation)
    """How layers and projections become one number."""

    def opened(self) -> FeatureStore:
        """The feature store.

        Raises:
            StoreError: there is none.
        """
        from selector.store import FeatureStore

        if not (self.store / MANIFEST).exists():
            raise StoreError(
                f"no feature store at {self.store}", got="no " + MANIFEST, fix="make one with `selector score`"
            )
        return FeatureStore.open(self.store)

    def scores(self, seed: int = 0) -> Scores:
        """Scores of the store.

        Args:
            seed: of the score `random`.
        """
        from selector.scores import score

        higher = {"auto": None, "high": True, "low": False}[self.prefer]
        return score(
            self.opened(),
            self.by,
            control=self.control,
            aggregation=self.aggregation,
            higher_first=higher,
            seed=seed,
        )
