"""`selector compare`: two selections from one pool, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.cli.select import SCORES, SELECTION
from selector.errors import SelectionError

if TYPE_CHECKING:
    from selector.selecting import Comparison
    from selector.types import Scores


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command):
    """Show what two selections from one pool share, and how they differ in length, source and coverage.

    Example: selector compare selection/ other/ --index index/

    Against its own random control: selector compare selection/ selection/matched_random.parquet
    """

    name: ClassVar[str] = "compare"

    first: Annotated[Path, Positional]
    """Directory that `selector select` wrote, or a selection file in one."""
    second: Annotated[Path, Positional]
    """Another one."""
    index: Path | None = None
    """Directory of an index of the store, to tell how well each selection covers the pool."""

    def run(self) -> int:
        from selector.index import GradientIndex
        from selector.policies import MemberNeighbours
        from selector.selecting import compare
        from selector.selection import Selection

        files = [path / SELECTION if path.is_dir() else path for path in (self.first, self.second)]
        selections = [Selection.load(path) for path in files]
        scores = _pool(files)
        neighbours = None
        if self.index is not None:
            index = GradientIndex.open(self.index)
            neighbours = MemberNeighbours(index, index.positions(scores.ids.tolist()))
        found = compare(selections[0], selections[1], scores, neighbours=neighbours)
        names = [escape(str(path)) for path in (self.first, self.second)]
        for table in _tables(found, names):
            console().print(table)
        return 0


def _pool(files: list[Path]) -> Scores:
    """The samples of the pool that have a score, from the table beside a selection."""
    from selector.scores import read_scores

    tables = [path.parent / SCORES for path in files if (path.parent / SCORES).is_file()]
    if not tables:
        raise SelectionError(
            "the pool is not known", got=f"no {SCORES} beside {files[0]}", fix="name a directory that `selector select` wrote"
        )  # fmt: skip
    scores = read_scores(tables[0])
    scored = np.isfinite(scores.values)
    columns = ("ids", "rows", "values", "raw", "n_tokens", "n_loss_tokens", "source")
    return replace(scores, **{name: getattr(scores, name)[scored] for name in columns})


def _tables(found: Comparison, names: list[str]) -> list[Table]:
    profiles = (found.first, found.second)
    sides = Table("", *names, title="selections")
    sides.add_row("samples", *(f"{one.samples:,}" for one in profiles))
    sides.add_row("tokens", *(f"{one.tokens:,}" for one in profiles))
    sides.add_row(
        "tokens per sample, quartiles", *(" / ".join(f"{q:,.0f}" for q in one.length_quartiles) for one in profiles)
    )
    for source in sorted({*found.first.sources, *found.second.sources}):
        sides.add_row(
            f"share of {escape(source or '(none)')}", *(f"{one.sources.get(source, 0.0):.1%}" for one in profiles)
        )
    if found.coverage is not None:
        sides.add_row("coverage: mean similarity to the nearest pick", *(f"{value:.4f}" for value in found.coverage))
    both = Table("", "value", "without a difference", title="between them")
    both.add_row("shared samples", f"{found.shared:,}", "")
    both.add_row("overlap: shared of all", f"{found.jaccard:.3f}", f"{found.expected_jaccard:.3f} by chance")
    both.add_row("length: a sample of the second is longer", f"{found.length_shift:.3f}", "0.500")
    both.add_row("sources: share that would have to change", f"{found.source_shift:.3f}", "0.000")
    return [sides, both]
