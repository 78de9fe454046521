"""What the scores say of data that somebody labelled, raw and with length taken out.

    python benchmarks/evidence/claims.py score --data DIR --model DIR --name small --out OUT    one model; can be killed and repeated
    python benchmarks/evidence/claims.py table --data DIR --out OUT                             all models in OUT

`table` prints and writes `benchmarks/results/evidence_claims_<date>.md` and `.json`: for every contrast of `contrasts.py` the AUC of every
score with a 95 % interval, on the half of the prompts that nothing was fitted on. Contrasts that are paired, or whose classes are
matched by length, come first, since on the others length alone may win.

A score's verdict on a contrast, with the sign that `expectations.yaml` wrote down beforehand:

    holds         with length taken out, the interval lies on the expected side of 0.5
    length only   it does so raw, and no longer when length is taken out
    wrong sign    with length taken out, the interval lies on the other side
    nothing       none of these
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from bootstrap import Order, concordance, like_pairs, matched_pairs, paired, resamples
from contrasts import Contrast, Row, build, union
from measured import CONTROLS, FORWARD, Measured, measure
from weighing import combination_tables

from selector.runtime import versions

RESAMPLES = 500
CALIPER = 0.15
"""Largest difference of log lengths of rows that count as of one length."""
FEWEST = 30
"""Rows of a class, or pairs, that a length-matched version needs in each half."""
RESULTS = Path(__file__).parents[1] / "results"
EXPECTATIONS = Path(__file__).with_name("expectations.yaml")
DEFAULT_CONTROL = "spline"


@dataclass(frozen=True)
class Finding:
    """What one score says of one contrast under one model, on one half."""

    model: str
    contrast: str
    matched: bool
    """Whether rows were matched by length."""
    score: str
    control: str
    half: str
    auc: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, eq=False)
class View:
    """One half of a contrast, as it is or matched by length."""

    contrast: Contrast
    matched: bool
    half: str
    rows: tuple[Row, ...]
    levels: np.ndarray

    @property
    def kind(self) -> str:
        """Paired rows are compared in pairs, all others by level."""
        return self.contrast.kind

    def order(self, scores: np.ndarray, count: int = RESAMPLES) -> Order:
        """How a score orders the rows.

        Args:
            scores: of the view's rows.
            count: resamples; 0 for the value alone.
        """
        weights = self.weights(count)
        return paired(scores, weights) if self.kind == "paired" else concordance(scores, self.levels, weights)

    @cache  # noqa: B019 - views live as long as the table
    def weights(self, count: int) -> np.ndarray:
        """Resamples of the view's prompts."""
        return resamples(np.array([row.group for row in self.rows]), count, seed=0)


def views(contrast: Contrast, measured: Measured) -> list[View]:
    """Both halves of a contrast, and both halves of its length-matched version where enough rows are left.

    Args:
        contrast: any.
        measured: gives the lengths by which rows are matched.
    """
    found = []
    levels = np.array(contrast.levels)
    lengths = measured.lengths()[measured.at(contrast.rows)]
    for half in ("development", "test"):
        own = np.array([row.is_test == (half == "test") for row in contrast.rows])
        if contrast.kind == "paired":
            alike = own & like_pairs(lengths[:, 1], CALIPER)
        elif contrast.kind == "classes":
            better, worse = (np.flatnonzero(own & (levels == level)) for level in (1.0, 0.0))
            pairs = matched_pairs(lengths[better], lengths[worse], CALIPER)
            alike = np.zeros(len(own), dtype=bool)
            alike[[better[i] for i, _ in pairs] + [worse[j] for _, j in pairs]] = True
        else:
            alike = np.zeros(len(own), dtype=bool)
        for matched, chosen in ((True, alike), (False, own)):
            if chosen.sum() >= 2 * FEWEST:
                rows = tuple(row for row, keep in zip(contrast.rows, chosen, strict=True) if keep)
                found.append(View(contrast, matched, half, rows, levels[chosen]))
    return found


def pools_of(rows: list[Row], measured: Measured) -> list[np.ndarray]:
    """Positions of the rows of each pool."""
    positions = measured.at(rows)
    names = np.array([row.pool for row in rows])
    return [positions[names == name] for name in np.unique(names)]


def findings_of(measured: Measured, contrasts: list[Contrast]) -> list[Finding]:
    """Every score on every contrast under one model."""
    pools = pools_of(union(contrasts), measured)
    every_view = [view for contrast in contrasts for view in views(contrast, measured)]
    positions = [measured.at(view.rows) for view in every_view]
    found = []
    for name in measured.raw:
        for control in CONTROLS:
            values = measured.controlled(name, control, pools)
            for view, at in zip(every_view, positions, strict=True):
                wide = view.half == "test" and control in ("none", DEFAULT_CONTROL)
                order = view.order(values[at], RESAMPLES if wide else 0)
                found.append(
                    Finding(measured.model, view.contrast.name, view.matched, name, control, view.half, order.value, *order.interval, order.rows)
                )  # fmt: skip
    return found


def expected_sign(score: str, contrast: str) -> int:
    """What was written down beforehand."""
    expectations = _expectations()
    measure_name = score.split(",")[0]
    own = expectations["exceptions"].get(contrast, {}).get(measure_name) or expectations["scores"][measure_name]
    return own["sign"]


@cache
def _expectations() -> dict:
    return yaml.safe_load(EXPECTATIONS.read_text())


def verdict(raw: Finding, controlled: Finding, sign: int) -> str:
    """In the words of the module."""
    if sign == 0:
        return "nothing expected"

    def side(finding: Finding) -> int:
        return sign * (int(finding.low > 0.5) - int(finding.high < 0.5))

    if side(controlled) > 0:
        return "holds"
    if side(controlled) < 0:
        return "wrong sign"
    return "length only" if side(raw) > 0 else "nothing"


def against_loss(contrasts: list[Contrast], measured: Measured) -> list[dict]:
    """On how many contrasts each controlled score beats controlled loss; one sign per score, chosen on development."""
    pools = pools_of(union(contrasts), measured)
    every_view = [view for contrast in contrasts for view in best_views(views(contrast, measured))]
    values = {name: measured.controlled(name, DEFAULT_CONTROL, pools) for name in measured.raw}
    signs = {}
    for name, one in values.items():
        sides = [
            view.order(one[measured.at(view.rows)], 0).value - 0.5 for view in every_view if view.half == "development"
        ]
        signs[name] = 1.0 if np.nanmean(sides) >= 0 else -1.0
    test = [view for view in every_view if view.half == "test"]
    orders = {
        name: [view.order(signs[name] * one[measured.at(view.rows)]) for view in test] for name, one in values.items()
    }
    table = []
    for name, own in orders.items():
        gains = [a.value - b.value for a, b in zip(own, orders["loss"], strict=True)]
        sure = [np.nanpercentile(a.resampled - b.resampled, 2.5) > 0 for a, b in zip(own, orders["loss"], strict=True)]
        mean = np.nanmean([order.resampled for order in own], axis=0)
        low, high = np.nanpercentile(mean, [2.5, 97.5])
        table.append(
            {"model": measured.model, "score": name, "sign": signs[name], "mean AUC": float(np.nanmean([order.value for order in own])),
             "low": float(low), "high": float(high), "contrasts": len(own), "beats loss": int(np.sum(np.array(gains) > 0)),
             "surely": int(np.sum(sure))}
        )  # fmt: skip
    return sorted(table, key=lambda row: -row["mean AUC"])


def best_views(own: list[View]) -> list[View]:
    """Of each half the length-matched view, else the one as it is."""
    matched = {view.half: view for view in own if view.matched}
    return [matched.get(view.half, view) for view in own if not view.matched]


def short_table(findings: list[Finding], model: str) -> list[str]:
    """Main scores on every contrast, the length-matched views first."""
    by_key = {(f.contrast, f.matched, f.score, f.control): f for f in findings if f.model == model and f.half == "test"}
    shown = [name for name in dict.fromkeys(f.score for f in findings) if "," not in name and name != "random"]
    lines = []
    for matched in (True, False):
        names = [c for c in dict.fromkeys(f.contrast for f in findings) if (c, matched, "loss", "none") in by_key]
        lines += [
            "", f"### {model}, {'rows matched by length' if matched else 'rows as they are'}", "",
            "| contrast | rows | " + " | ".join(shown) + " |", "|---|---|" + "---|" * len(shown),
        ]  # fmt: skip
        for contrast in names:
            cells = []
            for name in shown:
                raw, controlled = (by_key[contrast, matched, name, control] for control in ("none", DEFAULT_CONTROL))
                word = verdict(raw, controlled, expected_sign(name, contrast))
                cells.append(
                    f"{raw.auc:.2f} → {controlled.auc:.2f} [{controlled.low:.2f}, {controlled.high:.2f}] {word}"
                )
            lines.append(
                f"| {contrast} | {by_key[contrast, matched, 'loss', 'none'].rows} | " + " | ".join(cells) + " |"
            )
    return lines


def table(arguments: argparse.Namespace) -> None:
    """Read what `score` left for each model and write the tables."""
    contrasts = build(arguments.data, arguments.limit)
    models = [Measured.load(path) for path in sorted(arguments.out.glob("*.parquet"))]
    findings, aims, combined = [], [], []
    for measured in models:
        known = set(measured.ids.tolist())
        own = [c for c in contrasts if all(row.id in known for row in c.rows)]
        findings += findings_of(measured, own)
        aims += against_loss(own, measured)
        combined += combination_tables(
            measured, own, pools_of(union(own), measured), lambda c, m=measured: best_views(views(c, m))
        )
    report = {
        "date": datetime.now(UTC).date().isoformat(), "models": [m.model for m in models], "rows": len(union(contrasts)),
        "contrasts": {c.name: {"kind": c.kind, "rows": len(c.rows)} for c in contrasts}, "resamples": RESAMPLES, "caliper": CALIPER,
        "machine": platform.machine(), "versions": versions(),
    }  # fmt: skip
    lines = [
        f"# Claims: {len(contrasts)} labelled contrasts, {report['rows']:,} rows, {len(models)} models", "",
        "AUC on the test half of the prompts: raw → with length taken out (spline) [95 % interval] verdict.", "",
        "## One score, one sign (chosen on development), mean AUC over the test contrasts with length taken out", "",
        "| model | score | sign | mean AUC [95 %] | beats controlled loss | surely |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model in report["models"]:
        own = [row for row in aims if row["model"] == model]
        for row in [*own[:12], *(row for row in own[12:] if "," not in row["score"])]:
            lines.append(
                f"| {model} | {row['score']} | {row['sign']:+.0f} | {row['mean AUC']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
                f"| {row['beats loss']} of {row['contrasts']} | {row['surely']} |"
            )
    lines += [
        "", "## Combinations, weights fitted on development contrasts, evaluated on test", "",
        "| model | features | mean AUC [95 %] | beats controlled loss | surely |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['model']} | {row['features']} | {row['mean AUC']:.3f} [{row['low']:.3f}, {row['high']:.3f}] "
        f"| {row['beats loss']} of {row['contrasts']} | {row['surely']} |"
        for row in combined
    ]
    for model in report["models"]:
        lines += short_table(findings, model)
    print("\n".join(lines))
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"evidence_claims_{report['date']}"
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    content = report | {"one score": aims, "combinations": combined, "findings": [asdict(f) for f in findings]}
    path.with_suffix(".json").write_text(json.dumps(_rounded(content), separators=(",", ":")) + "\n")


def _rounded(value):
    """Numbers of five digits: what is past them is noise, and the file stays small."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.5g}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("score", "table"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled data sets")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of stores and score tables, kept between stages"
    )
    parser.add_argument("--limit", type=int, default=700, help="rows of a class, or pairs, of each contrast")
    parser.add_argument("--model", type=Path, help="checkpoint to score with")
    parser.add_argument("--name", help="of the model in tables; its folder's name when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.stage == "table":
        return table(arguments)
    if arguments.model is None:
        parser.error("score needs --model")
    name = arguments.name or arguments.model.resolve().name
    rows = union(build(arguments.data, arguments.limit))
    found = measure(arguments.model, name, rows, arguments.out / name, ("spectra", *FORWARD), arguments.device)
    found.save(arguments.out / f"{name}.parquet")
    print(f"{name}: {len(found.ids):,} rows, {len(found.raw)} scores")


if __name__ == "__main__":
    main()
