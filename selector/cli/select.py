"""`selector select`: spend a budget on the samples with the best scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.config import save_yaml
from selector.errors import ConfigError, StoreError
from selector.scores.aggregate import Aggregation
from selector.store.schema import CONFIG, MANIFEST

if TYPE_CHECKING:
    from rich.console import Console

    from selector.selection import Selection
    from selector.types import Scores

SELECTION, CONTROL, SCORES = "selection.parquet", "matched_random.parquet", "scores.parquet"


@dataclass(frozen=True, kw_only=True)
class SelectCommand(Command):
    """Pick the samples to train on, and a random control of the same length profile beside them.

    Example: selector select features/ --budget 10% --out selection/

    Writes selection.parquet, matched_random.parquet and scores.parquet.
    """

    name: ClassVar[str] = "select"

    store: Annotated[Path, Positional]
    """Directory of the feature store, or a scores.parquet."""
    out: Path
    """Directory of the selection."""
    by: str | None = None
    """What to score by: effective_rank, nuclear_norm, frobenius_norm, spectral_norm, stable_rank, layer_profile_difference,
    loss, perplexity, n_tokens, prompt_tokens, response_tokens, random, or a scorer that the store was made with."""
    budget: str = "10%"
    """How much: 500, 10%, 200k tokens, or 10% tokens."""
    policy: str = "top"
    """How to pick: top, bottom, random, band, threshold and others."""
    options: tuple[str, ...] = ()
    """Options of the policy, as name=value: low=0.5 high=0.9."""
    control: Literal["length", "bins", "per-token", "none"] = "length"
    """How length is taken out of the score; length is the residual of a spline."""
    prefer: Literal["auto", "high", "low"] = "auto"
    """Which end of the score comes first; auto is high for ranks, low for norms and loss, and what its authors take for scorers."""
    aggregation: Aggregation = field(default_factory=Aggregation)
    """How layers and projections become one number."""
    index: Path | None = None
    """Directory of an index, for policies about similarity."""
    seed: int = 0
    """All that chance depends on."""

    def run(self) -> int:
        from selector.index import GradientIndex
        from selector.scores import read_scores, score, write_scores
        from selector.selecting import matched_random, select
        from selector.store import FeatureStore

        if self.store.is_dir() and not (self.store / MANIFEST).exists():
            raise StoreError(
                f"no feature store at {self.store}", got="no " + MANIFEST, fix="make one with `selector score`"
            )
        if self.store.is_file():
            scores = read_scores(self.store, self.by)
        else:
            higher = {"auto": None, "high": True, "low": False}[self.prefer]
            scores = score(
                FeatureStore.open(self.store),
                self.by,
                control=self.control,
                aggregation=self.aggregation,
                higher_first=higher,
                seed=self.seed,
            )
        index = {"index": GradientIndex.open(self.index)} if self.index is not None else {}
        selection = select(scores, budget=self.budget, policy=self.policy, seed=self.seed, **index, **self._options())
        control = matched_random(selection, scores, seed=self.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        selection.save(self.out / SELECTION)
        control.save(self.out / CONTROL)
        write_scores(self.out / SCORES, {scores.provenance.get("by", "score"): scores})
        save_yaml(self.out / CONFIG, self.settings(), f"replay with: selector run {self.out}")
        out = console()
        explain(out, scores, selection)
        out.print(f"{self.out / SELECTION}: {len(selection):,} samples, {selection.n_tokens.sum():,} tokens")
        out.print(
            f"{self.out / CONTROL}: {len(control):,} samples, {control.n_tokens.sum():,} tokens, drawn at random with the same lengths"
        )
        return 0

    def _options(self) -> dict[str, Any]:
        parsed = {}
        for entry in self.options:
            name, equals, value = entry.partition("=")
            if not equals:
                raise ConfigError("an option of the policy cannot be read", got=entry, allowed="name=value")
            parsed[name] = yaml.safe_load(value)
        return parsed


def explain(out: Console, scores: Scores, selection: Selection) -> None:
    """Print how far length explains the score, and where the selection comes from.

    Args:
        out: where to print.
        scores: the pool.
        selection: picked from it.
    """
    from selector.scores import length_correlation

    correlation = length_correlation(scores)
    lengths = Table("score", "Spearman with tokens", title=f"length and {scores.provenance.get('by', 'score')}")
    lengths.add_row("raw", f"{correlation.raw:+.3f}")
    lengths.add_row(
        "length-controlled (selected by)"
        if scores.provenance.get("control", {}).get("kind") != "none"
        else "selected by",
        f"{correlation.controlled:+.3f}",
    )
    out.print(lengths)
    sources = Table("source", "samples", "tokens", "picked samples", "picked tokens", title="sources")
    for source, counts in selection.provenance["sources"].items():
        sources.add_row(
            source or "(none)",
            *(f"{counts[key]:,}" for key in ("samples", "tokens", "picked_samples", "picked_tokens")),
        )
    out.print(sources)
    for what, count in selection.provenance["removed"].items():
        out.print(f"left out: {count:,} ({what})")
