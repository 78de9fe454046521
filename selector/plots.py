"""Figures for papers, drawn by matplotlib from the same tables as the report: vector formats, units on every axis.

Colours are those of Okabe and Ito, which people with colour-blindness tell apart; lines differ in dashes as well, and maps use
cividis and PuOr. Figures are objects of their own: no global state of matplotlib is touched.

Source: Okabe and Ito, Color Universal Design, 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from selector.report import Report
from selector.report.features import UNITS
from selector.report.figures import contrast_limit, grid, label, where
from selector.report.svg import visible
from selector.types import MEASURES

COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DASHES = ("-", "-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
WIDTH, HEIGHT = 6.75, 2.4
"""Inches: both columns of a paper, and one row of panels."""
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42, "svg.hashsalt": "selector", "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip
"""Text stays text in PDF, names with dollar signs too, and the same tables give the same SVG."""
MOST_LINES = len(COLORS)


def layers(report: Report) -> dict[str, Figure]:
    """Layer x projection maps of each measure: the pool, and selections and controls minus the pool in percent.

    Args:
        report: its table `layers` is drawn.
    """
    table, found = report.tables["layers"], {}
    groups = dict(zip(table["group"].to_pylist(), table["kind"].to_pylist(), strict=True))
    chosen = [name for name, kind in groups.items() if kind in ("selection", "control")][: MOST_LINES - 1]
    for measure in (*MEASURES, "stable_rank") if len(table) else ():
        figure, panels = _panels(1 + len(chosen))
        limit = contrast_limit(table, measure)
        for axes, group in zip(panels, ["pool", *chosen], strict=True):
            pool = group == "pool"
            values, rows, columns = grid(
                where(table, measure=measure, group=group), "mean" if pool else "ratio_to_pool"
            )
            ends: dict[str, Any] = {"cmap": "cividis"} if pool else {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
            image = axes.imshow(values if pool else 100 * (values - 1), aspect="auto", interpolation="nearest", **ends)
            axes.set_title(group if pool else f"{visible(group).replace(': ', chr(10))}\nminus pool", fontsize=7)
            axes.set(xlabel="layer", yticks=range(len(rows)), yticklabels=rows)
            every = range(0, len(columns), max(1, len(columns) // 6))
            axes.set(xticks=list(every), xticklabels=[str(columns[i]) for i in every])
            figure.colorbar(
                image, ax=axes, label=f"{measure.replace('_', ' ')} ({UNITS[measure]})" if pool else "difference (%)"
            )
        found[f"layers_{measure}"] = figure
    return found


def length(report: Report) -> dict[str, Figure]:
    """Each score against tokens, raw beside length-controlled, with a smooth line.

    Args:
        report: its tables `cells`, `lines` and `correlations` are drawn.
    """
    found = {}
    for entry in report.tables["correlations"].to_pylist():
        figure, panels = _panels(2)
        for axes, form in zip(panels, ("raw", "controlled"), strict=True):
            key = {"score": entry["score"], "form": form}
            cells = where(report.tables["cells"], kind="pool", **key)
            smooth = where(report.tables["lines"], **key)
            image = _cells(axes, cells)
            axes.plot(smooth["tokens"].to_numpy(), smooth["value"].to_numpy(), color=COLORS[1])
            axes.set(xlabel="tokens", ylabel=label(entry["score"], form), title=f"Spearman {entry[form]:+.2f}")
            _plain(figure.colorbar(image, ax=axes, label="samples").ax.yaxis)
        found[f"length_{entry['score']}"] = figure
    return found


def distributions(report: Report) -> dict[str, Figure]:
    """Length, raw and controlled score: of the pool, selections and controls; and of the sources.

    Args:
        report: its table `distributions` is drawn.
    """
    table = report.tables["distributions"]
    kinds = dict(zip(table["group"].to_pylist(), table["kind"].to_pylist(), strict=True))
    sets = {"selected": ("pool", "selection", "control"), "sources": ("source",)}
    found = {}
    for name, wanted in sets.items():
        groups = [group for group, kind in kinds.items() if kind in wanted][:MOST_LINES]
        if not groups:
            continue
        figure, panels = _panels(3)
        for axes, variable in zip(panels, ("tokens", "raw", "controlled"), strict=True):
            for group, color, dash in zip(groups, COLORS, DASHES, strict=False):
                part = where(table, variable=variable, group=group)
                edges = np.append(part["low"].to_numpy(), part["high"].to_numpy()[-1:])
                axes.stairs(part["share"].to_numpy(), edges, color=color, linestyle=dash, label=visible(group))
                _scale(axes.xaxis, edges)
            axes.set(
                xlabel="tokens" if variable == "tokens" else label(report.about["by"], variable),
                ylabel="share of samples",
            )
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        found[f"distributions_{name}"] = figure
    return found


def spectra(report: Report) -> dict[str, Figure]:
    """Spectra of explained samples, a panel per projection and a line per layer.

    Args:
        report: its table `explanations` is drawn; without rows there is no figure.
    """
    table = where(report.tables["layers"], measure=MEASURES[0], group="pool")
    names, depth = table["projection"].to_pylist(), table["layer"].to_numpy()
    shown = list(dict.fromkeys(names))
    found = {}
    for number, entry in enumerate(report.tables["explanations"].to_pylist()):
        figure, panels = _panels(len(shown))
        for sigma, name, layer in zip(entry["spectra"], names, depth.tolist(), strict=True):
            if sigma:
                axes = panels[shown.index(name)]
                axes.loglog(
                    range(1, len(sigma) + 1),
                    sigma,
                    color=mpl.colormaps["cividis"](layer / max(int(depth.max()), 1)),
                    linewidth=0.8,
                )
        for axes, name in zip(panels, shown, strict=True):
            _plain(axes.xaxis, axes.yaxis)
            axes.set(title=name, xlabel="number", ylabel="singular value (loss per weight)")
        figure.suptitle(f"{visible(entry['sample_id'])}, layers from first (dark) to last (light)")
        found[f"spectra_{number}"] = figure
    return found


FIGURES: dict[str, Callable[[Report], dict[str, Figure]]] = {
    "layers": layers,
    "length": length,
    "distributions": distributions,
    "spectra": spectra,
}


def save(report: Report, names: tuple[str, ...], folder: Path, kind: Literal["pdf", "png", "svg"]) -> list[Path]:
    """Draw figures and write one file for each.

    Args:
        report: what is drawn.
        names: of `FIGURES`.
        folder: made when missing; files of the same names are replaced.
        kind: format of the files.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name in names:
            for title, figure in FIGURES[name](report).items():
                written.append(folder / f"{title}.{kind}")
                figure.savefig(
                    written[-1],
                    dpi=300,
                    metadata=None if kind == "png" else {"Date": None} if kind == "svg" else {"CreationDate": None},
                )
    return written


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _cells(axes: Axes, table: pa.Table) -> PolyCollection:
    left, right, low, high = (table[name].to_numpy() for name in ("tokens_low", "tokens_high", "low", "high"))
    corners = np.stack(
        [np.stack([x, y], axis=1) for x, y in ((left, low), (left, high), (right, high), (right, low))], axis=1
    )
    counts = table["samples"].to_numpy()
    norm = LogNorm(1, max(int(counts.max(initial=1)), 2))
    image = PolyCollection(list(corners), array=counts, norm=norm, cmap="cividis", edgecolors="none")
    axes.add_collection(image)
    _scale(axes.xaxis, np.unique(left))
    _scale(axes.yaxis, np.unique(low))
    axes.autoscale_view()
    return image


def _scale(axis: Axis, edges: np.ndarray) -> None:
    """A logarithmic axis where bins grow by a factor."""
    if len(edges) > 2 and edges[0] > 0 and edges[-1] - edges[-2] > 1.01 * (edges[1] - edges[0]):
        axis.axes.set(**{"xscale" if axis is axis.axes.xaxis else "yscale": "log"})
        _plain(axis)


def _plain(*axes: Axis) -> None:
    """Ticks of logarithmic axes: written out, at 1, 2 and 5 of each decade where these are few."""
    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
