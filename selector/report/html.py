"""One self-contained HTML page: no network, no libraries, light and dark, and nothing of a data set's text is ever markup.

Text from data sets, models and settings passes through autoescaping, and control characters are made visible. The page's
Content-Security-Policy admits the hash of its own script alone, so that even text that got past that could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import yaml
from markupsafe import Markup

from selector.report import figures
from selector.report.build import Report
from selector.report.features import UNITS
from selector.report.figures import where
from selector.report.svg import number, text_of
from selector.types import MEASURES

TOKENS = 1500
"""Tokens of a sample that are shown."""
TOKEN_SHADES = 8
STRONGEST = 5
"""Tokens that are also named in words, for those who do not see shades."""
KINDS = {
    "top": "Best by the score",
    "border": "At the border of the selection: last picked, first not picked",
    "bottom": "Worst by the score",
    "failed": "Without a score",
}
STRONG, WEAK = 0.5, 0.2
"""Sizes of a rank correlation that are called so."""


def render(report: Report) -> str:
    """The page of a report.

    Args:
        report: its tables and facts.

    Returns:
        HTML, complete in itself.
    """
    assets = files("selector.report")
    script, style = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    loader = jinja2.FunctionLoader(lambda name: assets.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        autoescape=True,
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    environment.filters |= {
        "number": number,
        "percent": _percent,
        "signed": _signed,
        "duration": _duration,
        "yaml": _yaml,
        "words": lambda name: str(name).replace("_", " "),
    }
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        script=Markup(script), style=Markup(style), digest=digest, **page_context(report)
    )  # fmt: skip


def page_context(report: Report) -> dict[str, Any]:
    """Everything that the template shows.

    Args:
        report: its tables and facts.
    """
    tables, about = report.tables, report.about
    records = {
        name: table.to_pylist()
        for name, table in tables.items()
        if name not in ("cells", "lines", "distributions", "layers")
    }
    groups = [r["group"] for r in records["comparison"]]
    by = about["by"]
    sources = list(dict.fromkeys(where(tables["distributions"], kind="source")["group"].to_pylist()))
    draw = partial(figures.distribution_figure, tables["distributions"], score=by)
    return {
        **records,
        "about": about,
        "by": by,
        "unit": UNITS.get(by, ""),
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "selection": next(iter(about["selections"]), None),
        "groups": groups,
        "source_groups": sources,
        "line_classes": figures.LINES,
        "verdict": verdict(records["correlations"][0]),
        "group_figures": [draw(variable, groups[: len(figures.LINES)]) for variable in ("tokens", "raw", "controlled")],
        "source_figures": [draw(variable, sources) for variable in ("tokens", "raw", "controlled")] if sources else [],
        "length_figures": _length_figures(tables, [r["score"] for r in records["correlations"]]),
        "maps": _maps(tables["layers"]),
        "sample_kinds": _cards(records["samples"], records["explanations"]),
        "spectra": _spectra(records["explanations"], tables["layers"]),
        "kinds": KINDS,
        "index": about.get("index"),
        "explained": len(records["explanations"]),
    }


def verdict(correlation: Mapping[str, Any]) -> str:
    """Whether length explains a score, in a few words.

    Args:
        correlation: a row of the table `correlations`.
    """
    return f"Raw {_degree(correlation['raw'])}, controlled {_degree(correlation['controlled'])}"


def _degree(correlation: float) -> str:
    size = abs(correlation)
    if math.isnan(size):
        return "unknown"
    return "mostly" if size >= STRONG else "partly" if size >= WEAK else "hardly"


def _finalize(value: Any) -> Any:
    """Make control characters of text visible before it is escaped; figures and other markup of ours stay as they are."""
    return text_of(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(value: int | float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def _signed(value: int | float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f}".replace("-", "−")


def _duration(seconds: int | float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} seconds"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(value, default=str)), sort_keys=False, allow_unicode=True, width=100)


def _length_figures(tables: Mapping[str, pa.Table], names: list[str]) -> dict[str, list[Markup]]:
    draw = partial(figures.length_figure, tables["cells"], tables["lines"])
    return {name: [draw(name, form) for form in ("raw", "controlled")] for name in names}


def _maps(layers: pa.Table) -> list[dict[str, Any]]:
    """For each measure the maps of the pool, of selections and controls against it, and of the sources."""
    kinds = dict(zip(layers["group"].to_pylist(), layers["kind"].to_pylist(), strict=True))
    found = []
    for measure in (*MEASURES, "stable_rank") if len(layers) else ():
        limit = figures.contrast_limit(layers, measure)
        contrasts = [
            (g, figures.contrast_map(layers, measure, g, limit))
            for g, kind in kinds.items()
            if kind in ("selection", "control")
        ]
        sources = [(g, figures.mean_map(layers, measure, g)) for g, kind in kinds.items() if kind == "source"]
        means = where(layers, measure=measure, kind="pool")["mean"].drop_null().to_numpy()
        ends = {"low": float(means.min()), "high": float(means.max())} if len(means) else {"low": None, "high": None}
        pool = figures.mean_map(layers, measure, "pool")
        found.append(
            {
                "measure": measure,
                "unit": UNITS[measure],
                **ends,
                "pool": pool,
                "contrasts": contrasts,
                "limit": limit,
                "sources": sources,
            }
        )
    return found


def _cards(samples: list[dict[str, Any]], explanations: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    explained = {entry["sample_id"]: entry for entry in explanations}
    shown = {sample["sample_id"] for sample in samples}
    cards: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for sample in samples:
        cards[sample["kind"]].append(sample | {"view": token_view(explained.get(sample["sample_id"]))})
    others = [{"sample_id": name, "view": token_view(entry)} for name, entry in explained.items() if name not in shown]
    return {kind: found for kind, found in cards.items() if found} | ({"explained": others} if others else {})


def token_view(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Tokens with their shades, and the strongest in words.

    Args:
        entry: a row of the table `explanations`; None for a sample that was not explained.
    """
    if entry is None or not entry["tokens"]:
        return None
    size = np.asarray(entry["contribution"], dtype=np.float64)
    largest, squares = float(size.max()) or 1.0, float(np.square(size).sum()) or 1.0
    shades = np.ceil(TOKEN_SHADES * size / largest - 1e-9).astype(int).tolist()
    order = np.argsort(-size, kind="stable")[:STRONGEST].tolist()
    tokens = list(zip(entry["tokens"], shades, entry["loss_mask"], strict=True))
    return {
        "tokens": tokens[:TOKENS],
        "left": max(0, len(tokens) - TOKENS),
        "strongest": [
            (entry["tokens"][i].strip() or repr(entry["tokens"][i]), i + 1, float(size[i] ** 2 / squares))
            for i in order
        ],
    }


def _spectra(explanations: list[dict[str, Any]], layers: pa.Table) -> list[dict[str, Any]]:
    table = where(layers, measure=MEASURES[0], group="pool")
    projections = table["projection"].to_pylist()
    found = []
    for entry in explanations:
        if entry["spectra"]:
            drawn = {
                name: figures.spectrum_figure(entry["spectra"], projections, name)
                for name in dict.fromkeys(projections)
            }
            found.append(
                {
                    "sample_id": entry["sample_id"],
                    "figures": {name: drawing for name, drawing in drawn.items() if drawing},
                }
            )
    return found
