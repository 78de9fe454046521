"""`selector plot`: figures for papers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from selector.cli.command import console
from selector.cli.evidence import EvidenceCommand
from selector.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlotCommand(EvidenceCommand):
    """Draw the figures of a report for a paper: PDF, SVG or PNG, one file each.

    Example: selector plot features/ selection/ --out figures/ --figures layers length
    """

    name: ClassVar[str] = "plot"

    out: Path = Path("figures")
    """Directory of the figures."""
    figures: tuple[Literal["layers", "length", "distributions", "spectra"], ...] = (
        "layers",
        "length",
        "distributions",
        "spectra",
    )
    """Which figures to draw; spectra are those of samples that were scored with --explain."""
    format: Literal["pdf", "png", "svg"] = "pdf"
    """Format of the files."""

    def run(self) -> int:
        if find_spec("matplotlib") is None:
            raise ConfigError(
                "figures need matplotlib", got="no matplotlib", fix="pip install 'gradient-selector[plots]'"
            )
        from selector.plots import save
        from selector.report import build_report

        written = save(build_report(self.evidence()), self.figures, self.out, self.format)
        console().print(f"{self.out}: {len(written)} figures, {', '.join(path.name for path in written)}")
        return 0
