"""`selector report`: one HTML page that shows what was selected, what it costs, why, and whether length explains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from selector.cli.command import console
from selector.cli.evidence import EvidenceCommand


@dataclass(frozen=True, kw_only=True)
class ReportCommand(EvidenceCommand):
    """Write one self-contained HTML page about a store and selections from it.

    Example: selector report features/ selection/ --out report.html

    The page needs no network and opens from disk. It shows texts of samples: share it as you would share the data set.
    """

    name: ClassVar[str] = "report"

    out: Path = Path("report.html")
    """The page, replaced when it exists."""
    tables: Path | None = None
    """Directory that also gets the report's tables as Parquet files."""

    def run(self) -> int:
        from selector.report import build_report, render
        from selector.store.writer import write_atomically

        report = build_report(self.evidence())
        page = render(report).encode("utf-8")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, page)
        if self.tables is not None:
            report.save(self.tables)
        console().print(f"{self.out}: {len(page) / 2**20:.1f} MiB; open it in a browser")
        return 0
