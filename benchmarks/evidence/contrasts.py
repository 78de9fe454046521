"""Labelled contrasts: rows of real data of which somebody said that some are better, or harder, than others.

Every contrast is one of three kinds:

    paired     two completions of one prompt; what counts is how often the better one has the higher score
    classes    two classes of rows; reported once as they are and once with every row of the smaller class matched to one of the
               other class of like prompt and completion length
    ordinal    rows with a level; reported as the share of concordant pairs

Rows are split in development and test by a hash of their normalized prompt before anything is computed, so that pairs and repeated
prompts stay together. Nothing may be fitted or chosen on the test half.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Raw = dict[str, Any]
PAIRS_PER_TASK = 60
STYLES = {"none": "none", "simple": "simple", "detailed_gpt4o": "detailed"}
FLASK_LEVELS = (
    "simple lifestyle knowledge", "advanced lifestyle knowledge", "formal education knowledge", "major level knowledge",
    "expert level knowledge",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sample to score."""

    id: str
    pool: str
    """Data set that it comes from; length controls are fitted on all rows of one pool, without labels."""
    prompt: str
    completion: str

    @property
    def group(self) -> str:
        """Hash of the normalized prompt: what is resampled, split and kept together."""
        return hashlib.sha256(" ".join(self.prompt.lower().split()).encode()).hexdigest()

    @property
    def is_test(self) -> bool:
        """Which half the row belongs to."""
        return int(self.group[:8], 16) % 2 == 1


@dataclass(frozen=True)
class Contrast:
    """Rows and what was said of them."""

    name: str
    kind: Literal["paired", "classes", "ordinal"]
    rows: tuple[Row, ...]
    """For a paired contrast the better and the worse one of each pair in turn."""
    levels: tuple[float, ...]
    """Label of each row; the higher, the better or the harder."""


def read(path: Path) -> list[Raw]:
    """Rows of a JSON-lines file, plain or compressed by zstandard."""
    if path.suffix != ".zst":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    import zstandard

    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        return [json.loads(line) for line in io.TextIOWrapper(stream, encoding="utf-8")]


def build(data: Path, limit: int = 700) -> list[Contrast]:
    """All contrasts whose files are in a folder.

    Args:
        data: folder of `NAME.jsonl.zst` or `NAME.jsonl` files.
        limit: rows of a class, or pairs, at most; drawn by a hash of the id, so that more rows contain fewer.
    """
    contrasts: list[Contrast] = []
    for name, make in MAKERS.items():
        found = [path for suffix in (".jsonl.zst", ".jsonl") if (path := data / f"{name}{suffix}").exists()]
        if found:
            rows = [raw for raw in read(found[0]) if raw["prompt"].strip() and raw["completion"].strip()]
            contrasts += make(rows, limit)
    if {"reasoning_r1_400", "gsm8k"} <= {path.name.split(".")[0] for path in data.iterdir()}:
        traces, solutions = (
            read(next(p for p in data.iterdir() if p.name.split(".")[0] == name)) for name in ("reasoning_r1_400", "gsm8k")
        )
        contrasts += list(_traces_and_solutions(traces, solutions))
    return contrasts


def union(contrasts: Sequence[Contrast]) -> list[Row]:
    """Every row once, ordered by id."""
    rows = {row.id: row for contrast in contrasts for row in contrast.rows}
    return [rows[i] for i in sorted(rows)]


def sampled(rows: Sequence[Raw], count: int) -> list[Raw]:
    """The rows with the smallest hashes of their ids."""
    return sorted(rows, key=lambda raw: hashlib.sha256(raw["id"].encode()).digest())[:count]


def _row(raw: Raw, pool: str) -> Row:
    return Row(raw["id"], pool, raw["prompt"], raw["completion"])


def _paired(name: str, pool: str, pairs: Sequence[tuple[Raw, Raw]]) -> Contrast:
    rows = tuple(_row(raw, pool) for pair in pairs for raw in pair)
    return Contrast(name, "paired", rows, (1.0, 0.0) * len(pairs))


def _expert_revised(rows: list[Raw], limit: int) -> list[Contrast]:
    by_prompt: dict[str, dict[int, Raw]] = {}
    for raw in rows:
        by_prompt.setdefault(raw["prompt"], {})[int(raw["q_expert"])] = raw
    better = [versions[1] for versions in by_prompt.values() if len(versions) == 2]
    pairs = [
        (raw, by_prompt[raw["prompt"]][0])
        for raw in sampled(better, limit)
        if raw["completion"] != by_prompt[raw["prompt"]][0]["completion"]
    ]
    return [_paired("expert-revised", "car", pairs)]


def _alpaca(rows: list[Raw], limit: int) -> list[Contrast]:
    rows = [raw for raw in rows if raw["unbiased_sample"]]
    names = {
        "rated by claude": "q_claude_ge4_5", "rated helpful": "q_helpfulness_ge4_5", "cherry-ifd": "q_cherry_ifd_top5",
        "car selected": "q_car_selected",
    }  # fmt: skip
    none = [raw for raw in rows if not any(raw[flag] for flag in names.values())]
    others = sampled(none, 2 * limit)
    contrasts = []
    for name, flag in names.items():
        members = sampled([raw for raw in rows if raw[flag]], limit)
        contrasts.append(
            Contrast(name, "classes", tuple(_row(raw, "alpaca") for raw in members + others), (1.0,) * len(members) + (0.0,) * len(others))
        )  # fmt: skip
    return contrasts


def _chains_of_thought(rows: list[Raw], limit: int) -> list[Contrast]:
    by_key = {(raw["task"], raw["style"], raw["index"], raw["shuffled"]): raw for raw in rows}
    tasks = sorted({raw["task"] for raw in rows})
    per_task = min(PAIRS_PER_TASK, max(limit // len(tasks), 1))
    wrong: dict[str, list[tuple[Raw, Raw]]] = {name: [] for name in (*STYLES.values(), "wiki")}
    styles: dict[str, list[tuple[Raw, Raw]]] = {"detailed over simple": [], "detailed over none": []}
    for task in tasks:
        indices = sorted({raw["index"] for raw in rows if raw["task"] == task})[:per_task]
        for (own, style, index, shuffled), raw in by_key.items():
            other = by_key.get((own, style, index, True))
            if own == task and index in indices and not shuffled and other is not None and not other["is_correct"]:
                wrong[STYLES.get(style, "wiki")].append((raw, other))
        for index in indices:
            detailed, simple, none = (by_key.get((task, style, index, False)) for style in ("detailed_gpt4o", "simple", "none"))
            if detailed and simple:
                styles["detailed over simple"].append((detailed, simple))
            if detailed and none:
                styles["detailed over none"].append((detailed, none))
    contrasts = [_paired(f"correct over shuffled, {name}", "cot", pairs) for name, pairs in wrong.items() if pairs]
    return contrasts + [_paired(f"chain of thought, {name}", "cot", pairs) for name, pairs in styles.items() if pairs]


def _math(rows: list[Raw], limit: int) -> list[Contrast]:
    rows = [raw for raw in rows if raw["has_solution"]]
    levelled = [raw for level in range(1, 6) for raw in sampled([r for r in rows if r["level"] == level], limit // 3)]
    ranked = sampled([raw for raw in rows if raw.get("limr_score") is not None], limit)
    return [
        Contrast(name, "ordinal", tuple(_row(raw, "math") for raw in chosen), tuple(float(raw[label]) for raw in chosen))
        for name, chosen, label in (("math level", levelled, "level"), ("limr score", ranked, "limr_score"))
    ]


def _flask(rows: list[Raw], limit: int) -> list[Contrast]:
    reference = sampled([raw for raw in rows if raw["model"] == "reference" and raw["difficulty"] in FLASK_LEVELS], limit)
    difficulty = Contrast(
        "flask difficulty", "ordinal", tuple(_row(raw, "flask") for raw in reference),
        tuple(float(FLASK_LEVELS.index(raw["difficulty"])) for raw in reference),
    )  # fmt: skip
    strong, weak = ({raw["prompt"]: raw for raw in rows if raw["model"] == model} for model in ("gpt4", "alpaca_13b"))
    both = sampled([raw for prompt, raw in strong.items() if prompt in weak and weak[prompt]["completion"].strip()], limit // 2)
    return [difficulty, _paired("gpt-4 over alpaca-13b", "flask", [(raw, weak[raw["prompt"]]) for raw in both])]


def _traces_and_solutions(traces: list[Raw], solutions: list[Raw]) -> Iterator[Contrast]:
    """Traces of a reasoning model, on hard questions and on easy ones, and plain solutions of the easy ones."""
    hard = [raw for raw in traces if not raw["in_gsm8k_test"]]
    easy = [raw for raw in traces if raw["in_gsm8k_test"]]
    plain = {raw["prompt"].strip(): raw for raw in solutions if raw["split"] == "test"}
    pairs = [(raw, plain[raw["prompt"].strip()]) for raw in easy if raw["prompt"].strip() in plain]
    yield Contrast(
        "s1 traces over gsm8k traces", "classes", tuple(_row(raw, "traces") for raw in hard + easy), (1.0,) * len(hard) + (0.0,) * len(easy)
    )  # fmt: skip
    yield _paired("r1 trace over plain solution", "traces", pairs)


MAKERS: dict[str, Callable[[list[Raw], int], list[Contrast]]] = {
    "car_expert_revised": _expert_revised,
    "alpaca_union_labeled": _alpaca,
    "layer_gradient_cot": _chains_of_thought,
    "math_levels": _math,
    "flask_difficulty_skill": _flask,
}
