"""The findings of all models as one document: what is asked first, then everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from findings import CONTROL, Finding, expected_sign, verdict
from measured import CONTROLS, PARTS, Measured

from selector.scores import spearman

WORDS = ("holds", "wrong sign", "length only", "nothing", "nothing expected")
LENGTHS = ("n_tokens", "prompt_tokens")
Key = tuple[str, str, bool, str, str]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return ["", *lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def by_key(findings: Sequence[Finding]) -> dict[Key, Finding]:
    """Findings by contrast, half, matched or not, score and control."""
    return {(f.contrast, f.half, f.matched, f.score, f.control): f for f in findings}


def main_scores(findings: Sequence[Finding]) -> list[str]:
    """Scores of the whole model, in the order of the store; two of the three lengths only restate the third."""
    return [name for name in dict.fromkeys(f.score for f in findings) if "," not in name and name not in LENGTHS]


def word_on(known: dict[Key, Finding], contrast: str, matched: bool, score: str) -> str:
    """Verdict on the test half."""
    raw, controlled = known[contrast, "test", False, score, "none"], known[contrast, "test", matched, score, CONTROL]
    return verdict(raw, controlled, expected_sign(score, contrast))


def in_short(results: dict[str, dict[str, Any]]) -> list[str]:
    """How often each word is said of each score, one line per score and model."""
    rows = []
    for model, result in results.items():
        known = by_key(result["findings"])
        for score in main_scores(result["findings"]):
            words = Counter(
                word_on(known, contrast, matched, score) for contrast, matched in result["headline"].items()
            )
            aucs = [
                known[contrast, "test", matched, score, CONTROL].auc for contrast, matched in result["headline"].items()
            ]
            rows.append([score, model, *(words[word] for word in WORDS), f"{np.nanmean(aucs):.3f}"])
    rows.sort(key=lambda row: row[0])
    return table(["score", "model", *WORDS, "mean AUC, unturned"], rows)


def for_all(results: dict[str, dict[str, Any]], most: int = 12) -> list[str]:
    """Single scores and combinations against controlled loss, best on development first."""
    rows = []
    for model, result in results.items():
        ranked = result["for all contrasts"]
        shown = [one for i, one in enumerate(ranked) if i < most or "weights" in one or "," not in one["score"]]
        for one in shown:
            sign = "" if "weights" in one else "+" if one["sign"] > 0 else "−"
            rows.append(
                [model, f"{sign} {one['score']}".strip(), f"{one['development']:.3f}", f"{one['mean AUC']:.3f} [{one['low']:.3f}, {one['high']:.3f}]",
                 f"{one['mean AUC, like lengths']:.3f}", f"{one['unseen']:.3f}" if "unseen" in one else "",
                 f"{one['beats loss']} of {one['contrasts']}", one["surely"], one["beats loss either way"],
                 f"{one['beats loss, like lengths']} of {one['contrasts of like lengths']}"]
            )  # fmt: skip
    header = [
        "model", "score", "development AUC", "test AUC [95 %]", "test AUC, like lengths", "test AUC, data sets unseen", "beats loss",
        "surely", "beats loss either way", "beats loss, like lengths",
    ]  # fmt: skip
    return table(header, rows)


def contrasts_table(result: dict[str, Any], matched: bool) -> list[str]:
    """Main scores on the test half of every contrast, as they are or matched."""
    known, scores = by_key(result["findings"]), main_scores(result["findings"])
    rows = []
    for (contrast, half, own), size in result["views"].items():
        if half != "test" or own != matched:
            continue
        cells = []
        for score in scores:
            raw, controlled = (known[contrast, "test", matched, score, control] for control in ("none", CONTROL))
            word = word_on(known, contrast, matched, score)
            cells.append(f"{raw.auc:.2f} → {controlled.auc:.2f} [{controlled.low:.2f}, {controlled.high:.2f}] {word}")
        rows.append([contrast, size, *cells])
    return table(["contrast", "size", *scores], rows)


def model_parts(results: dict[str, dict[str, Any]]) -> list[str]:
    """Mean test AUC of each measure of each part of the model, turned as on development."""
    rows = []
    for model, result in results.items():
        known = {one["score"]: one for one in result["for all contrasts"]}
        measures = sorted({name.split(",")[0] for name in known if ", " in name and "weights" not in known[name]})
        for measure in measures:
            names = [f"{measure}, {part}" if part else measure for part in PARTS]
            rows.append(
                [
                    model,
                    measure,
                    *(
                        f"{known[name]['mean AUC']:.3f} ({'+' if known[name]['sign'] > 0 else '−'})"
                        if name in known
                        else ""
                        for name in names
                    ),
                ]
            )
    return table(["model", "measure", *(part or "all" for part in PARTS)], rows)


def controls_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """How far from 0.5 each main score is under each control, on rows as they are."""
    rows = []
    for model, result in results.items():
        known = by_key(result["findings"])
        for score in main_scores(result["findings"]):
            means = []
            for control in CONTROLS:
                own = [known[contrast, "test", False, score, control].auc for contrast in result["headline"]]
                means.append(f"{np.nanmean(np.abs(np.array(own) - 0.5)) + 0.5:.3f}")
            rows.append([model, score, *means])
    return table(["model", "score", *CONTROLS], rows)


def parts_table(result: dict[str, Any]) -> list[str]:
    """Main scores on the parts of contrasts that have some."""
    if not result["parts"]:
        return []
    known = {(one["contrast"], one["part"], one["score"]): one for one in result["parts"]}
    scores = main_scores(result["findings"])
    rows = []
    for contrast, part in dict.fromkeys((one["contrast"], one["part"]) for one in result["parts"]):
        own = [known[contrast, part, score] for score in scores]
        rows.append(
            [
                contrast,
                part,
                own[0]["pairs"],
                *(f"{one['auc']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]" for one in own),
            ]
        )
    return table(["contrast", "part", "pairs", *scores], rows)


def families(models: Sequence[Measured], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How far two models agree: on rows, and on contrasts.

    Args:
        models: scored on the same rows.
        results: by model.
    """
    found = []
    for a, b in combinations(models, 2):
        at = {name: i for i, name in enumerate(b.ids.tolist())}
        order = np.array([at.get(name, -1) for name in a.ids.tolist()])
        common = np.flatnonzero(order >= 0)
        first, second = by_key(results[a.model]["findings"]), by_key(results[b.model]["findings"])
        shared = [c for c in results[a.model]["headline"] if c in results[b.model]["headline"]]
        for score in main_scores(results[a.model]["findings"]):
            if score not in b.raw:
                continue
            pairs = np.array(
                [[known[c, "test", False, score, CONTROL].auc for known in (first, second)] for c in shared]
            )
            own, other = a.controlled(score, CONTROL, common), b.controlled(score, CONTROL, order[common])
            found.append(
                {"score": score, "models": [a.model, b.model], "Spearman of rows, raw": spearman(a.raw[score][common], b.raw[score][order[common]]),
                 "Spearman of rows, controlled": spearman(own[common], other[order[common]]),
                 "Spearman of contrasts": spearman(pairs[:, 0], pairs[:, 1]),
                 "same side of 0.5": float(np.mean((pairs[:, 0] - 0.5) * (pairs[:, 1] - 0.5) > 0)), "contrasts": len(shared)}
            )  # fmt: skip
    return found


def document(about: dict[str, Any], results: dict[str, dict[str, Any]], agreement: Sequence[dict[str, Any]]) -> str:
    """The whole of it in Markdown."""
    lines = [f"# What scores say of labelled data, {about['date']}", ""]
    lines += [
        f"{about['rows']:,} rows; seed {about['seed']}; {about['resamples']:,} resamples of prompts or pairs; length taken out by {about['control']}, fitted without "
        f"labels on all scored rows of a contrast's data sets; rows matched at {about['caliper']} in log tokens of prompt and completion. Every number is of the "
        "half of the prompts that nothing was fitted or chosen on, unless it says development. AUC: the share of comparable pairs that a score orders as their "
        "labels do. Expected signs were written down before: `benchmarks/evidence/expectations.yaml`.", "",
        f"Tables made on {about['tables made on']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}.",
    ]  # fmt: skip
    columns = ("parameters", "layers", "hidden", "vocabulary", "dtype", "max_length", "device", "status", "truncated")
    lines += table(["model", *columns], ([name, *(own[c] for c in columns)] for name, own in about["models"].items()))
    lines += [
        "## In short", "",
        "Contrasts on which each score does what was expected of it, length-matched where a match was found, with length taken out. The models",
        "are small base models: what holds for them need not hold for large ones.", *in_short(results),
        "## One number for all contrasts, against length-controlled loss", "",
        "A single score has one sign (+ or −), a combination one set of weights; both are of the development halves. Best on development first, so the",
        "first line of a model is what one would have chosen. Surely: by Holm's rule over the contrasts at 5 %. Either way: also against loss turned round",
        "where that helps loss. Data sets unseen: weights are of contrasts of other data sets; the development AUC of a combination is of such weights too.", *for_all(results),
    ]  # fmt: skip
    for model, result in results.items():
        lines += [
            f"## {model}: pairs, and rows matched by length",
            "",
            "Raw → length taken out [95 %] verdict.",
            *contrasts_table(result, True),
        ]
        lines += [f"## {model}: rows as they are", *contrasts_table(result, False)]
        lines += [f"## {model}: parts of contrasts, length taken out", *parts_table(result)] if result["parts"] else []
    lines += [
        "## Parts of the model",
        "",
        "Mean test AUC with length taken out; sign of the development halves.",
        *model_parts(results),
    ]
    lines += [
        "## Controls",
        "",
        "Mean distance of the AUC from 0.5, as an AUC, on rows as they are.",
        *controls_table(results),
    ]
    if agreement:
        header = [
            "score",
            "models",
            "Spearman of rows, raw",
            "Spearman of rows, controlled",
            "Spearman of contrasts",
            "same side of 0.5",
        ]
        own = ([one["score"], " / ".join(one["models"]), *(f"{one[h]:.2f}" for h in header[2:])] for one in agreement)
        lines += ["## Models compared", *table(header, own)]
    return "\n".join(lines)
