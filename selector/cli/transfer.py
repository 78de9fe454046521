"""`selector transfer`: may a small model score for a large one?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console


@dataclass(frozen=True, kw_only=True)
class TransferCommand(Command):
    """Compare the scores of the same samples under two models, by rank.

    Example: selector transfer features-0.5b/ features-7b/

    Raw scores agree through length alone; judge by the length-controlled column and the overlap of the best tenth.
    """

    name: ClassVar[str] = "transfer"

    first: Annotated[Path, Positional]
    """Feature store under one model."""
    second: Annotated[Path, Positional]
    """Feature store of the same samples under the other."""

    def run(self) -> int:
        from selector.scorer.transfer import transfer
        from selector.store import FeatureStore

        found = transfer(FeatureStore.open(self.first), FeatureStore.open(self.second))
        projections = list(found[0].by_projection)
        table = Table(
            "measure",
            "raw",
            "length-controlled",
            "top 10% shared",
            *projections,
            title=f"rank correlation over {found[0].samples:,} samples",
        )
        for row in found:
            cells = [row.raw, row.controlled, row.top_overlap, *(row.by_projection[name] for name in projections)]
            table.add_row(row.measure, *(f"{value:.2f}" for value in cells))
        console().print(table)
        return 0
