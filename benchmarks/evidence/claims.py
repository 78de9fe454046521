"""What the scores say of data that somebody labelled, raw and with length taken out.

    python benchmarks/evidence/claims.py rows  --data DIR --out OUT                   rows of all contrasts, once, as one file
    python benchmarks/evidence/claims.py score --model DIR --out OUT --name small     one model; can be killed and repeated
    python benchmarks/evidence/claims.py table --data DIR --out OUT                   all models scored in OUT

`score` reads nothing but `OUT/rows.parquet` and leaves, beside the feature store `OUT/small`, the file `OUT/small.scores.parquet`: a few
numbers per row and no text. `table` needs these files and the labels alone, prints the tables, and writes
`benchmarks/results/evidence_claims_<date>.md` and `.json`. What its words mean is said in `findings.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contrasts import LIMIT, PROMPTS_PER_TASK, Contrast, build, union
from findings import CALIPER, CONTROL, RESAMPLES, View, find, headline, pool_of, views
from measured import SUFFIX, Measured, measure, write_rows
from tables import document, families
from weighing import SETS, Halves, against_loss, combine, single

from selector.runtime import versions

RESULTS = Path(__file__).parents[1] / "results"


def rows_stage(arguments: argparse.Namespace) -> None:
    """Write the rows of all contrasts."""
    contrasts = build(arguments.data, arguments.limit)
    rows = union(contrasts)
    write_rows(rows, arguments.out / "rows.parquet")
    print(f"{arguments.out / 'rows.parquet'}: {len(rows):,} rows of {len(contrasts)} contrasts")


def score_stage(arguments: argparse.Namespace) -> None:
    """Score the rows with one model."""
    rows = arguments.out / "rows.parquet"
    if not rows.exists():
        if arguments.data is None:
            raise SystemExit(f"there is no {rows}: make it with `claims.py rows --data DIR --out {arguments.out}`")
        rows_stage(arguments)
    name = arguments.name or arguments.model.resolve().name
    found = measure(arguments.model, name, rows, arguments.out / name, arguments.device)
    path = arguments.out / f"{name}{SUFFIX}"
    found.save(path)
    print(
        f"{path}: {len(found.ids):,} rows, {len(found.raw)} scores, {path.stat().st_size / 1e6:.1f} MB; {found.about['status']}"
    )


def table_stage(arguments: argparse.Namespace) -> None:
    """Read what `score` left for each model and write the tables."""
    contrasts = build(arguments.data, arguments.limit)
    paths = sorted(arguments.out.glob(f"*{SUFFIX}"))
    if not paths:
        raise SystemExit(
            f"no scores in {arguments.out}: make them with `claims.py score --model DIR --out {arguments.out}`"
        )
    models = [Measured.load(path) for path in paths]
    for measured in models:
        missing = {row.id for row in union(contrasts)} - set(measured.ids.tolist())
        if missing:
            raise SystemExit(
                f"{measured.model} was scored on other rows: {len(missing):,} are missing, such as {min(missing)}; use the same --data and --limit"
            )
    models.sort(key=lambda measured: measured.about["parameters"])
    results = {measured.model: of_model(measured, contrasts) for measured in models}
    about = {
        "date": datetime.now(UTC).date().isoformat(), "rows": len(union(contrasts)), "control": CONTROL, "resamples": RESAMPLES,
        "caliper": CALIPER, "limit": arguments.limit, "prompts per task": PROMPTS_PER_TASK, "seed": 0,
        "tables made on": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(),
        "models": {measured.model: measured.about for measured in models},
    }  # fmt: skip
    agreement = families(models, results)
    text = document(about, results, agreement)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"evidence_claims_{about['date']}"
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    content = {"about": about, "families": agreement, "models": {name: as_plain(one) for name, one in results.items()}}
    path.with_suffix(".json").write_text(json.dumps(rounded(content), separators=(",", ":")) + "\n", encoding="utf-8")


def of_model(measured: Measured, contrasts: list[Contrast]) -> dict[str, Any]:
    """Everything that is found under one model."""
    rows_by_source: dict[str, list[int]] = {}
    for row, position in zip(union(contrasts), measured.at(union(contrasts)).tolist(), strict=True):
        rows_by_source.setdefault(row.source, []).append(position)
    sources = {source: np.array(own) for source, own in rows_by_source.items()}
    pools = [pool_of(contrast, sources) for contrast in contrasts]
    every = [views(contrast, measured) for contrast in contrasts]
    # a contrast of which a half is empty, as in small samples, can be looked at and not be fitted on
    halves = [
        Halves.of(own, pool)
        for own, pool in zip(every, pools, strict=True)
        if {view.half for view in own} == {"development", "test"}
    ]
    # lengths are left out: there is no length-controlled length
    candidates = [single(measured, halves, name) for name in measured.raw if not name.endswith("_tokens")]
    candidates += [
        combine(measured, halves, title, names) for title, names in SETS.items() if title != "loss" and set(names) <= measured.raw.keys()
    ]  # fmt: skip
    return {
        "findings": find(measured, every, pools),
        "views": {(view.contrast.name, view.half, view.matched): view.size for own in every for view in own},
        "headline": {own[0].contrast.name: headline(own, "test").matched for own in every if any(v.half == "test" for v in own)},
        "for all contrasts": against_loss(candidates, halves),
        "parts": [part for own, pool in zip(every, pools, strict=True) for part in of_parts(measured, own, pool)],
    }  # fmt: skip


def of_parts(measured: Measured, own: list[View], pool: np.ndarray) -> list[dict[str, Any]]:
    """Main scores on the test half of each part of a contrast."""
    found = []
    for name in sorted(set(own[0].contrast.parts)) if own else ():
        part = next(view for view in own if view.half == "test" and not view.matched).part(name)
        for score in (score for score in measured.raw if "," not in score):
            order = part.order(measured.controlled(score, CONTROL, pool))
            found.append({"contrast": part.contrast.name, "part": name, "score": score, "pairs": order.rows // 2, "auc": order.value, "interval": list(order.interval)})  # fmt: skip
    return found


def as_plain(result: dict[str, Any]) -> dict[str, Any]:
    """Results of one model for JSON: contrast, half, matched or not, score, control → AUC and interval."""
    nested: dict[str, Any] = {}
    for one in result["findings"]:
        view = nested.setdefault(one.contrast, {}).setdefault(
            f"{one.half}, {'matched' if one.matched else 'as is'}", {}
        )
        view.setdefault(one.score, {})[one.control] = [one.auc, one.low, one.high]
    sizes = {
        f"{contrast}, {half}, {'matched' if matched else 'as is'}": size
        for (contrast, half, matched), size in result["views"].items()
    }
    return {"auc": nested, "sizes": sizes} | {key: result[key] for key in ("headline", "for all contrasts", "parts")}


def rounded(value: Any) -> Any:
    """Numbers of four digits: what is past them is noise, and the file stays small."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.4g}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("rows", "score", "table"))
    parser.add_argument("--data", type=Path, help="folder of the labelled data sets")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of rows, stores and scores, kept between stages"
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="rows of a class, or pairs, of each contrast at most")
    parser.add_argument("--model", type=Path, help="checkpoint to score with")
    parser.add_argument("--name", help="of the model in tables; its folder's name when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    if arguments.stage in ("rows", "table") and arguments.data is None:
        parser.error(f"{arguments.stage} needs --data")
    if arguments.stage == "score" and arguments.model is None:
        parser.error("score needs --model")
    {"rows": rows_stage, "score": score_stage, "table": table_stage}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
