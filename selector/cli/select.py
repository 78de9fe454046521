"""`selector select`: spend a budget on the samples with the best scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from rich.table import Table

from selector.cli.command import console
from selector.cli.scored import ScoredCommand
from selector.config import load_yaml, save_yaml
from selector.errors import ConfigError
from selector.store.schema import CONFIG

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from selector.index import GradientIndex
    from selector.selection import Selection
    from selector.types import Scores

SELECTION, CONTROL, SCORES = "selection.parquet", "matched_random.parquet", "scores.parquet"
BUDGET = "10%"
TOP = (
    "The top of a score has trained no better model than chance draws where it was measured (README, Evidence): compare with "
    "the control before a long run, or remove the worse part and draw from the rest, as recipes/better_half.yaml does."
)
MATCHING = ("match-target", "target-subspace", "gradient-matching", "then", "union")
"""Policies that look at targets, and those made of others."""


@dataclass(frozen=True, kw_only=True)
class SelectCommand(ScoredCommand):
    """Pick the samples to train on, and a random control of the same length profile beside them.

    Example: selector select features/ --budget 10% --out selection/

    Samples whose gradients point the way of some examples, which are scored on the fly:
    selector select features/ --index index/ --policy match-target --targets examples.jsonl --out selection/

    Writes selection.parquet, matched_random.parquet and scores.parquet. STORE may also be a scores.parquet.
    """

    name: ClassVar[str] = "select"

    out: Path
    """Directory of the selection."""
    budget: str | None = None
    """How much: 500, 10%, 200k tokens, or 10% tokens; 10% where the policy's file says nothing either."""
    policy: str = "top"
    """How to pick: top, bottom, random, band, threshold and others; or a YAML file with `policy` and its options."""
    options: tuple[str, ...] = ()
    """Options of the policy, as name=value: low=0.5 high=0.9."""
    index: Path | None = None
    """Directory of an index, for policies about similarity."""
    targets: str | None = None
    """What to match: a data set of examples, scored with the store's model and settings; or a .txt file of sample ids, one a line, which are then not picked."""
    indexed_store: Path | None = None
    """Directory of the store that was indexed, for targets that are to be scored, where STORE is a scores.parquet."""
    seed: int = 0
    """All that chance depends on."""

    def run(self) -> int:
        from selector.index import GradientIndex
        from selector.policies import POLICIES, Budget
        from selector.policies.base import check_options
        from selector.scores import read_scores, write_scores
        from selector.selecting import matched_random, select

        plan = self._plan
        Budget.parse(plan["budget"])
        check_options(plan["policy"], POLICIES[plan["policy"]], plan["options"])
        if self.targets is not None:
            self._check_targets()
        scores = read_scores(self.store, self.by) if self.store.is_file() else self.scores(self.seed)
        index = GradientIndex.open(self.index) if self.index is not None else None
        selection = select(
            scores, budget=plan["budget"], policy=plan["policy"], index=index, target=self._target(index), seed=self.seed,
            **plan["options"],
        )  # fmt: skip
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
        if plan["policy"] == "top":
            out.print(TOP)
        return 0

    def settings(self) -> dict[str, Any]:
        """The policy's file is written out, so that a replay does not depend on it."""
        plan = self._plan
        options = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in plan["options"].items()]
        return super().settings() | {"policy": plan["policy"], "budget": plan["budget"], "options": options}

    @cached_property
    def _plan(self) -> dict[str, Any]:
        """Name, budget and options of the policy, from its file and the command line, which wins."""
        options = {}
        for entry in self.options:
            name, equals, value = entry.partition("=")
            if not equals:
                raise ConfigError("an option of the policy cannot be read", got=entry, allowed="name=value")
            options[name] = yaml.safe_load(value)
        if not self.policy.endswith((".yaml", ".yml")):
            return {"policy": self.policy, "budget": self.budget or BUDGET, "options": options}
        values = load_yaml(Path(self.policy))
        if not isinstance(values.get("policy"), str):
            raise ConfigError(
                f"{self.policy} names no policy", got=", ".join(map(str, values)) or "nothing", allowed="policy: NAME and its options"
            )  # fmt: skip
        name, budget = values.pop("policy"), values.pop("budget", BUDGET)
        return {"policy": name, "budget": self.budget or str(budget), "options": values | options}

    def _check_targets(self) -> None:
        if self._plan["policy"] not in MATCHING:
            raise ConfigError(
                f"the policy {self._plan['policy']!r} looks at no targets", got=f"--targets {self.targets}", allowed=", ".join(MATCHING),
                fix="choose one with --policy, or leave --targets out",
            )  # fmt: skip
        if self.index is None:
            raise ConfigError(
                "targets are compared in an index", got="no index", fix="make one with `selector index` and name it with --index"
            )  # fmt: skip

    def _target(self, index: GradientIndex | None) -> np.ndarray | list[str] | None:
        """Vectors of examples, or ids of samples."""
        from selector.cli.foreign import place
        from selector.data.load import load_rows
        from selector.store import FeatureStore

        if self.targets is None or index is None:
            return None
        if self.targets.endswith(".txt"):
            return _ids(Path(self.targets))
        if self.store.is_file() and self.indexed_store is None:
            raise ConfigError(
                "examples are scored as the indexed store was", got="a table of scores", fix="name the store with --indexed-store"
            )  # fmt: skip
        store = self.opened() if self.indexed_store is None else FeatureStore.open(self.indexed_store)
        return place(load_rows(self.targets), store, index)


def _ids(path: Path) -> list[str]:
    """Sample ids of a text file, one a line."""
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the targets cannot be read", got=error, allowed="a .txt file of sample ids") from error
    if not ids:
        raise ConfigError("there are no targets", got=f"{path} is empty", allowed="one sample id a line")
    return ids


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
