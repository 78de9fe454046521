"""Distributions and length dependence, binned, so that a report of a million samples is as small as one of a thousand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from selector.report.groups import Group, members
from selector.scores import length_correlation, spearman
from selector.scores.length import natural_spline
from selector.types import Scores

COLUMNS, ROWS = 72, 44
"""Cells of a score against length."""
BINS = 40
"""Most bars of a distribution; a small pool has fewer."""
OUTSIDE = 0.001
"""Share of samples at each end that is drawn at the edge, so that one outlier does not squeeze the rest."""
LINE = 32
"""Points of a smooth line."""
KNOTS = 5
FEWEST_FOR_A_LINE = 20


def forms(scores: Scores) -> dict[str, Float[np.ndarray, " N"]]:
    """The two values of each sample that are always shown side by side.

    Args:
        scores: of a pool.
    """
    # by direction, a score can be the negated measure; people read the measure itself
    sign = 1.0 if scores.provenance.get("higher_first", True) else -1.0
    return {"raw": scores.raw, "controlled": sign * scores.values}


def is_logarithmic(values: Float[np.ndarray, " N"], form: str) -> bool:
    """Whether values belong on a logarithmic axis: raw measures that are positive and span more than a factor of ten.

    Args:
        values: finite.
        form: `raw` or `controlled`.
    """
    return form == "raw" and len(values) > 0 and bool((values > 0).all()) and bool(values.max() > 10 * values.min())


def correlations_table(scores: Mapping[str, Scores]) -> pa.Table:
    """How far each score restates length, before and after control.

    Args:
        scores: by name.
    """
    records = []
    for name, one in scores.items():
        found, control = length_correlation(one), one.provenance.get("control", {})
        sign = 1.0 if one.provenance.get("higher_first", True) else -1.0
        records.append(
            {
                "score": name, "raw": found.raw, "controlled": sign * found.controlled,
                "completion_raw": spearman(one.raw, one.n_loss_tokens), "control": control.get("kind", "unknown"),
                "explained_by_length": control.get("explained"), "samples": int(np.isfinite(one.values).sum()),
            }
        )  # fmt: skip
    return pa.Table.from_pylist(records)


def length_tables(scores: Mapping[str, Scores], groups: Sequence[Group]) -> tuple[pa.Table, pa.Table]:
    """Counts of score against tokens on a grid, and a smooth line through them.

    Args:
        scores: by name; the first one is also counted for each selection.
        groups: the first one is the pool.

    Returns:
        Cells (score, form, kind, group, edges of tokens and value, samples) and lines (score, form, tokens, value).
    """
    cells: list[pa.Table] = []
    lines: list[pa.Table] = []
    for position, (name, one) in enumerate(scores.items()):
        for form, values in forms(one).items():
            valid = np.isfinite(values) & (one.n_tokens > 0)
            if not valid.any():
                continue
            x_edges = _edges(one.n_tokens[valid].astype(np.float64), COLUMNS, logarithmic=True)
            y_edges = _edges(values[valid], ROWS, is_logarithmic(values[valid], form))
            for group in groups:
                if group.kind == "pool" or (position == 0 and group.kind == "selection"):
                    at = members(group, one.rows)
                    at = at[valid[at]]
                    key = {"score": name, "form": form, "kind": group.kind, "group": group.title}
                    cells.append(_cells(key, one.n_tokens[at], values[at], x_edges, y_edges))
            lines.append(_line({"score": name, "form": form}, one.n_tokens, values, valid, y_edges))
    return pa.concat_tables(cells), pa.concat_tables(lines)


def distributions_table(scores: Scores, groups: Sequence[Group]) -> pa.Table:
    """Histograms of length, raw and controlled score for every group, over the same bins.

    Args:
        scores: of the pool.
        groups: the first one is the pool.

    Returns:
        Columns variable, kind, group, low, high, share (of the group's samples).
    """
    found: list[pa.Table] = []
    for variable, values in ({"tokens": scores.n_tokens.astype(np.float64)} | forms(scores)).items():
        valid = np.isfinite(values) & ((values > 0) | (variable != "tokens"))
        if not valid.any():
            continue
        bins = int(np.clip(2 * np.cbrt(valid.sum()), 4, BINS))
        edges = _edges(values[valid], bins, variable == "tokens" or is_logarithmic(values[valid], variable))
        for group in groups:
            at = members(group, scores.rows)
            shown = values[at[valid[at]]]
            counts = np.bincount(_bin(shown, edges), minlength=bins)
            columns = {"variable": [variable] * bins, "kind": [group.kind] * bins, "group": [group.title] * bins}
            found.append(
                pa.table(columns | {"low": edges[:-1], "high": edges[1:], "share": counts / max(len(shown), 1)})
            )
    return pa.concat_tables(found)


def _edges(values: Float[np.ndarray, " N"], bins: int, logarithmic: bool) -> Float[np.ndarray, " B"]:
    low, high = np.quantile(values, [OUTSIDE, 1 - OUTSIDE]).tolist()
    if high <= low:
        room = abs(low) * 0.05 or 0.5
        low, high = low - room, high + room
    return np.geomspace(low, high, bins + 1) if logarithmic else np.linspace(low, high, bins + 1)


def _bin(
    values: Float[np.ndarray, " N"] | Int[np.ndarray, " N"], edges: Float[np.ndarray, " B"]
) -> Int[np.ndarray, " N"]:
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def _cells(
    key: dict[str, str], tokens: Int[np.ndarray, " K"], values: Float[np.ndarray, " K"],
    x_edges: Float[np.ndarray, " X"], y_edges: Float[np.ndarray, " Y"],
) -> pa.Table:  # fmt: skip
    flat = _bin(tokens, x_edges) * ROWS + _bin(values, y_edges)
    counts = np.bincount(flat, minlength=COLUMNS * ROWS)
    filled = np.flatnonzero(counts)
    x, y = filled // ROWS, filled % ROWS
    columns = {name: [value] * len(filled) for name, value in key.items()}
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in columns.items()}
        | {
            "tokens_low": x_edges[x],
            "tokens_high": x_edges[x + 1],
            "low": y_edges[y],
            "high": y_edges[y + 1],
            "samples": counts[filled],
        }
    )


def _line(
    key: dict[str, str], tokens: Int[np.ndarray, " N"], values: Float[np.ndarray, " N"], valid: Bool[np.ndarray, " N"],
    y_edges: Float[np.ndarray, " Y"],
) -> pa.Table:  # fmt: skip
    """Least-squares natural cubic spline over log tokens; of log values where the axis is logarithmic."""
    x, y = np.log(tokens[valid]), values[valid]
    logarithmic = is_logarithmic(y, key["form"])
    knots = np.unique(np.quantile(x, np.linspace(0.02, 0.98, KNOTS)))
    shown_x = shown_y = np.zeros(0)
    if len(x) >= FEWEST_FOR_A_LINE and len(knots) > 1:
        design, target = _design(x, knots), np.log(y) if logarithmic else y
        fit = np.linalg.lstsq(design.T @ design, design.T @ target, rcond=None)[0]
        shown_x = np.linspace(float(np.quantile(x, 0.005)), float(np.quantile(x, 0.995)), LINE)
        shown_y = _design(shown_x, knots) @ fit
        shown_y = np.clip(np.exp(shown_y) if logarithmic else shown_y, y_edges[0], y_edges[-1])
    columns = {name: pa.array([value] * len(shown_x), pa.string()) for name, value in key.items()}
    return pa.table(columns | {"tokens": np.exp(shown_x), "value": shown_y})


def _design(x: Float[np.ndarray, " N"], knots: Float[np.ndarray, " K"]) -> Float[np.ndarray, "N C"]:
    return np.concatenate([np.ones((len(x), 1)), natural_spline(x, knots)], axis=1)
