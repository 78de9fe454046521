"""The figures of a report, drawn from its tables alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from markupsafe import Markup

from selector.report import svg
from selector.report.features import UNITS
from selector.report.svg import Axis
from selector.types import PROJECTIONS

SPECTRUM_POINTS = 28
"""Points of one spectrum."""
SPECTRUM_FLOOR = 1e-4
"""Smallest singular value that is drawn, relative to the largest."""
LINES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
"""Classes of line colours and dashes, in the order of their use."""


def where(table: pa.Table, **equal: str) -> pa.Table:
    """Rows of a table in which columns have given values.

    Args:
        table: any table.
        equal: value by column.
    """
    for column, value in equal.items():
        table = table.filter(pc.equal(table[column], value))  # pyright: ignore[reportAttributeAccessIssue]
    return table


def label(score: str, form: str = "raw") -> str:
    """Axis label of a score.

    Args:
        score: its name.
        form: `raw` or `controlled`.
    """
    name = score.replace("_", " ")
    return f"{name} ({UNITS.get(score, 'score')})" if form == "raw" else f"{name}, length-controlled"


def grid(table: pa.Table, column: str) -> tuple[Float[np.ndarray, "P L"], list[str], list[int]]:
    """One measure of one group as a matrix.

    Args:
        table: rows of one group and one measure of the table `layers`.
        column: `mean` or `ratio_to_pool`.

    Returns:
        Values, NaN where there is none; names of the projections; numbers of the layers.
    """
    names, layers = table["projection"].to_pylist(), table["layer"].to_pylist()
    known = [name for name in PROJECTIONS if name in names]
    rows = [*known, *dict.fromkeys(name for name in names if name not in known)]
    columns = sorted(set(layers))
    values = np.full((len(rows), len(columns)), np.nan)
    found = pc.fill_null(table[column], float("nan")).to_numpy()
    values[[rows.index(name) for name in names], np.searchsorted(columns, layers)] = found
    return values, rows, columns


def mean_map(layers: pa.Table, measure: str, group: str) -> Markup:
    """Layer x projection means of one group.

    Args:
        layers: the table of that name.
        measure: which measure.
        group: which group.
    """
    values, rows, columns = grid(where(layers, measure=measure, group=group), "mean")
    shown = np.log(values) if (np.nanmax(values, initial=0) > 10 * np.nanmin(values, initial=np.inf) > 0) else values
    return svg.heat_map(
        values, rows, columns, limit=None, shading=shown, text=f"{measure} of {group}, by layer and projection"
    )


def contrast_map(layers: pa.Table, measure: str, group: str, limit: float) -> Markup:
    """How far the means of one group lie above or below those of the pool, in percent.

    Args:
        layers: the table of that name.
        measure: which measure.
        group: which group.
        limit: percent that have the full colour.
    """
    values, rows, columns = grid(where(layers, measure=measure, group=group), "ratio_to_pool")
    percent = 100 * (values - 1)
    return svg.heat_map(
        percent, rows, columns, limit=limit, shading=percent, text=f"{measure} of {group} minus the pool, percent"
    )


def contrast_limit(layers: pa.Table, measure: str) -> float:
    """The largest percentage of any selection or control, for one colour scale in all maps of a measure."""
    part = where(layers, measure=measure)
    chosen = part.filter(pc.is_in(part["kind"], value_set=pa.array(["selection", "control"])))  # pyright: ignore[reportAttributeAccessIssue]
    ratios = pc.fill_null(chosen["ratio_to_pool"], 1.0).to_numpy()
    return max(float(np.abs(100 * (ratios - 1)).max(initial=0)), 1e-9)


def length_figure(cells: pa.Table, lines: pa.Table, score: str, form: str) -> Markup:
    """A score against tokens: the pool, what the first selection picked, and a smooth line.

    Args:
        cells: the table of that name.
        lines: the table of that name.
        score: which score.
        form: `raw` or `controlled`.
    """
    part = where(cells, score=score, form=form)
    pool = where(part, kind="pool")
    if not len(pool):
        return Markup("")
    x = _axis("tokens", pool, "tokens_low", "tokens_high", logarithmic=True)
    y = _axis(label(score, form), pool, "low", "high", logarithmic=_is_geometric(pool))
    marks = _cells(x, y, pool, "pool", palest=0.3)
    picked = where(part, kind="selection")
    if len(picked):
        marks += _cells(x, y, where(picked, group=picked["group"][0].as_py()), "picked", palest=0.8)
    smooth = where(lines, score=score, form=form)
    marks += svg.line(x, y, smooth["tokens"].to_numpy(), smooth["value"].to_numpy(), "smooth")
    return svg.frame(x, y, marks, f"{label(score, form)} against tokens of each sample")


def distribution_figure(distributions: pa.Table, variable: str, groups: list[str], score: str) -> Markup:
    """Histograms of several groups over the same bins.

    Args:
        distributions: the table of that name.
        variable: `tokens`, `raw` or `controlled`.
        groups: which groups, in the order of their colours.
        score: name of the score.
    """
    part = where(distributions, variable=variable)
    shown = [where(part, group=name) for name in groups]
    if not len(part):
        return Markup("")
    name = "tokens" if variable == "tokens" else label(score, variable)
    x = _axis(name, part, "low", "high", logarithmic=_is_geometric(shown[0]))
    y = Axis("share of samples", 0.0, max(float(group["share"].to_numpy().max()) for group in shown) * 1.05)
    marks = Markup("")
    for css, group in zip(LINES, shown, strict=False):
        low, high, share = (group[column].to_numpy() for column in ("low", "high", "share"))
        marks += svg.line(x, y, np.stack([low, high], axis=1).ravel(), np.repeat(share, 2), css)
    return svg.frame(x, y, marks, f"distribution of {name}: {', '.join(groups)}")


def spectrum_figure(spectra: list[list[float] | None], projections: list[str], projection: str) -> Markup:
    """Singular values of one sample's gradients, one line per layer.

    Args:
        spectra: over the layer table.
        projections: of each entry of the layer table.
        projection: which one is drawn.
    """
    chosen = [
        np.array(s) for s, name in zip(spectra, projections, strict=True) if name == projection and s and s[0] > 0
    ]
    if not chosen:
        return Markup("")
    longest = max(len(s) for s in chosen)
    x = Axis("number of the singular value", 1.0, float(max(longest, 2)), logarithmic=True)
    y = Axis("relative to the largest", SPECTRUM_FLOOR, 1.0, logarithmic=True)
    marks = Markup("")
    for i, sigma in enumerate(chosen):
        at = np.unique(np.geomspace(1, len(sigma), SPECTRUM_POINTS).astype(int)) - 1
        drawn = sigma[at] / sigma[0]
        at, drawn = at[drawn > SPECTRUM_FLOOR], drawn[drawn > SPECTRUM_FLOOR]
        shade = 3 + round(9 * i / max(len(chosen) - 1, 1))
        marks += svg.line(x, y, at + 1.0, drawn, f"depth s{shade}")
    return svg.frame(x, y, marks, f"spectra of {projection}, one line per layer")


def _axis(name: str, table: pa.Table, low: str, high: str, *, logarithmic: bool) -> Axis:
    return Axis(name, float(table[low].to_numpy().min()), float(table[high].to_numpy().max()), logarithmic)


def _is_geometric(table: pa.Table) -> bool:
    """Whether bins grow by a factor: then the widest and the narrowest are in the ratio of their places."""
    low, high = table["low"].to_numpy(), table["high"].to_numpy()
    first, last = int(np.argmin(low)), int(np.argmax(low))
    return bool(low[first] > 0 and (high - low)[last] > 1.01 * (high - low)[first])


def _cells(x: Axis, y: Axis, table: pa.Table, css: str, *, palest: float) -> Markup:
    columns = tuple(table[name].to_numpy() for name in ("tokens_low", "tokens_high", "low", "high"))
    return svg.cells(x, y, columns[:2], columns[2:], table["samples"].to_numpy().astype(np.float64), css, palest)  # pyright: ignore[reportArgumentType]
