"""Labelled contrasts: rows of real data of which somebody said that some are better, or harder, than others.

    paired      two completions of one prompt, or one completion under its own and under another prompt
    classes     two classes of rows
    ordinal     rows with a level

Rows are split in development and test by a hash of their normalized prompt before anything is computed, so that pairs and repeated
prompts stay together. Nothing may be fitted or chosen on the test half. Which rows take part is decided by hashes of ids alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

Raw = dict[str, Any]
LIMIT = 700
"""Rows of a class, or pairs, of a contrast at most."""
PROMPTS_PER_TASK = 80
"""Of the reasoning tasks, which are three styles each."""
CALIPER = 0.1
"""Largest difference of the log characters of two answers that are exchanged."""
STYLES = {"none": "none", "simple": "simple", "detailed_gpt4o": "detailed"}
FLASK_LEVELS = (
    "simple lifestyle knowledge", "advanced lifestyle knowledge", "formal education knowledge", "major level knowledge",
    "expert level knowledge",
)  # fmt: skip
ALPACA_FLAGS = {
    "rated by claude": "q_claude_ge4_5", "rated helpful": "q_helpfulness_ge4_5", "cherry-ifd": "q_cherry_ifd_top5",
    "car selected": "q_car_selected",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sample to score."""

    id: str
    source: str
    """Data set that it comes from."""
    prompt: str
    completion: str

    @property
    def prompt_hash(self) -> str:
        """Hash of the normalized prompt."""
        return hashlib.sha256(" ".join(self.prompt.lower().split()).encode()).hexdigest()

    @property
    def is_test(self) -> bool:
        """Which half the row belongs to."""
        return int(self.prompt_hash[:8], 16) % 2 == 1


@dataclass(frozen=True, eq=False)
class Contrast:
    """Rows and what was said of them."""

    name: str
    kind: Literal["paired", "classes", "ordinal"]
    rows: tuple[Row, ...]
    """For a paired contrast the better and the worse one of each pair in turn."""
    levels: tuple[float, ...]
    """Label of each row; the higher, the better or the harder."""
    groups: tuple[str, ...]
    """What each row is resampled with."""
    parts: tuple[str, ...] = ()
    """Part of the contrast that each row belongs to, for a table of parts; none when empty."""

    @property
    def sources(self) -> frozenset[str]:
        """Data sets of the rows; length controls are fitted on all scored rows of these, without labels."""
        return frozenset(row.source for row in self.rows)


def build(data: Path, limit: int = LIMIT) -> list[Contrast]:
    """All contrasts whose files are in a folder.

    Args:
        data: folder of `NAME.jsonl.zst` or `NAME.jsonl` files.
        limit: rows of a class, or pairs, at most; a larger one adds rows.

    Raises:
        SystemExit: no contrast can be made of what is there.
    """
    found = {path.name.split(".")[0]: path for path in sorted(data.glob("*.jsonl*"))} if data.is_dir() else {}
    contrasts = [
        contrast
        for names, make in MAKERS.items()
        if found.keys() >= set(names)
        for contrast in make(*([raw for raw in read(found[name]) if raw["prompt"].strip() and raw["completion"].strip()] for name in names), limit)
        if contrast.rows
    ]  # fmt: skip
    if not contrasts:
        wanted = sorted({name for names in MAKERS for name in names})
        raise SystemExit(
            f"no labelled data in {data}: got {sorted(found) or 'no files'}, wanted {', '.join(wanted)} as .jsonl or .jsonl.zst"
        )
    return contrasts


def union(contrasts: Sequence[Contrast]) -> list[Row]:
    """Every row once, ordered by id."""
    rows = {row.id: row for contrast in contrasts for row in contrast.rows}
    return [rows[i] for i in sorted(rows)]


def read(path: Path) -> list[Raw]:
    """Rows of a JSON-lines file, plain or compressed by zstandard."""
    with pa.input_stream(path, compression="zstd" if path.suffix == ".zst" else None) as stream:
        return [json.loads(line) for line in stream.read().decode().split("\n") if line.strip()]


def sampled(rows: Sequence[Raw], count: int) -> list[Raw]:
    """The rows with the smallest hashes of their ids."""
    return sorted(rows, key=lambda raw: hashlib.sha256(raw["id"].encode()).digest())[:count]


def near_pairs(distance: np.ndarray, caliper: float) -> list[tuple[int, int]]:
    """Pairs of rows, nearest first, each row in one pair at most.

    Args:
        distance: [N, N] from each row as first to each as second of a pair, infinite where they make none.
        caliper: largest distance of a pair.
    """
    first, second = np.nonzero(distance <= caliper)
    order = np.argsort(distance[first, second], kind="stable")
    used: set[int] = set()
    pairs = []
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if i not in used and j not in used:
            used |= {i, j}
            pairs.append((i, j))
    return pairs


def _row(raw: Raw, source: str) -> Row:
    return Row(raw["id"], source, raw["prompt"], raw["completion"])


def _levelled(name: str, kind: Literal["classes", "ordinal"], rows: Sequence[tuple[Row, float]]) -> Contrast:
    own = tuple(row for row, _ in rows)
    return Contrast(name, kind, own, tuple(level for _, level in rows), tuple(row.prompt_hash for row in own))


def _paired(
    name: str, pairs: Sequence[tuple[Row, Row]], groups: Sequence[str] = (), parts: Sequence[str] = ()
) -> Contrast:
    """Pairs of rows; what is resampled is a prompt, unless groups are given, one for each pair."""
    rows = tuple(row for pair in pairs for row in pair)
    groups = groups or [better.prompt_hash for better, _ in pairs]
    return Contrast(
        name,
        "paired",
        rows,
        (1.0, 0.0) * len(pairs),
        tuple(g for g in groups for _ in "12"),
        tuple(p for p in parts for _ in "12"),
    )


def exchanged(rows: Sequence[Row]) -> list[tuple[tuple[Row, Row], str]]:
    """Each row against the same prompt with the answer of another row of like length, and the couple that both belong to.

    Rows are coupled within their half, nearest length first, and exchange their answers, so over all pairs right and wrong answers
    are the same texts. Rows without a partner are left out.

    Args:
        rows: of one task and style.
    """
    lengths = np.log([len(row.completion) for row in rows])
    half = np.array([row.is_test for row in rows])
    answers = np.array([row.completion.strip() for row in rows])
    couple = (
        (half[:, None] == half) & (answers[:, None] != answers) & np.triu(np.ones((len(rows), len(rows)), dtype=bool))
    )
    distance = np.where(couple, np.abs(lengths[:, None] - lengths), np.inf)
    found = []
    for i, j in near_pairs(distance, CALIPER):
        for own, other in ((rows[i], rows[j]), (rows[j], rows[i])):
            wrong = Row(f"{own.id} with answer of {other.id}", own.source, own.prompt, other.completion)
            found.append(((own, wrong), f"{rows[i].id} {rows[j].id}"))
    return found


def _expert_revised(rows: list[Raw], limit: int) -> Iterator[Contrast]:
    """Alpaca answers and what an expert made of them, where the prompt stayed the same."""
    by_prompt: dict[str, dict[int, Raw]] = {}
    for raw in rows:
        by_prompt.setdefault(raw["prompt"], {})[int(raw["q_expert"])] = raw
    better = sampled([versions[1] for versions in by_prompt.values() if len(versions) == 2], limit)
    yield _paired("expert-revised", [(_row(raw, "car"), _row(by_prompt[raw["prompt"]][0], "car")) for raw in better])


def _alpaca(rows: list[Raw], limit: int) -> Iterator[Contrast]:
    """Rows that somebody's selection flagged against unflagged ones, both of the unbiased sample."""
    rows = [raw for raw in rows if raw["unbiased_sample"]]
    others = sampled(rows, 2 * limit)
    for name, flag in ALPACA_FLAGS.items():
        members = sampled([raw for raw in rows if raw[flag]], limit)
        own = [(raw, 1.0) for raw in members] + [(raw, 0.0) for raw in others if not raw[flag]]
        yield _levelled(name, "classes", [(_row(raw, "alpaca"), level) for raw, level in own])


def _chains_of_thought(rows: list[Raw], limit: int) -> Iterator[Contrast]:
    """Right answers against exchanged ones by style, and styles against each other on the same questions."""
    right = [raw for raw in rows if not raw["shuffled"]]
    count = min(PROMPTS_PER_TASK, limit)
    by_task = {(raw["task"], raw["style"]): [] for raw in right}
    for raw in right:
        by_task[raw["task"], raw["style"]].append(raw)
    chosen: dict[tuple[str, str], dict[int, Row]] = {}
    for (task, style), own in sorted(by_task.items()):
        # questions have numbers that their styles share
        own = sorted(own, key=lambda raw: hashlib.sha256(f"{raw['task']} {raw['index']}".encode()).digest())[:count]
        chosen[task, style] = {raw["index"]: _row(raw, "chain of thought") for raw in own}
    for name in (*STYLES.values(), "wiki"):
        found, parts = [], []
        for (task, style), own in chosen.items():
            if STYLES.get(style, "wiki") == name:
                couples = exchanged(list(own.values()))
                found += couples
                parts += [style if name == "wiki" else task] * len(couples)
        yield _paired(
            f"right over exchanged, {name}", [pair for pair, _ in found], [group for _, group in found], parts
        )
    for better, worse in (("detailed_gpt4o", "simple"), ("detailed_gpt4o", "none"), ("simple", "none")):
        pairs = [
            (row, chosen[task, worse][index])
            for (task, style), own in chosen.items()
            if style == better and (task, worse) in chosen
            for index, row in own.items()
            if index in chosen[task, worse]
        ]
        yield _paired(f"chain of thought, {STYLES[better]} over {STYLES[worse]}", pairs)


def _math(rows: list[Raw], limit: int) -> Iterator[Contrast]:
    rows = [raw for raw in rows if raw["has_solution"]]
    levels = [
        raw for level in range(1, 6) for raw in sampled([r for r in rows if r["level"] == level], math.ceil(limit / 3))
    ]
    impact = sampled([raw for raw in rows if raw.get("limr_score") is not None], limit)
    for name, chosen, label in (("math level", levels, "level"), ("limr score", impact, "limr_score")):
        yield _levelled(name, "ordinal", [(_row(raw, "math"), float(raw[label])) for raw in chosen])


def _flask(rows: list[Raw], limit: int) -> Iterator[Contrast]:
    """Difficulty of questions, by their reference answers, and answers of a strong and of a weak model."""
    reference = sampled(
        [raw for raw in rows if raw["model"] == "reference" and raw["difficulty"] in FLASK_LEVELS], limit
    )
    levels = [float(FLASK_LEVELS.index(raw["difficulty"])) for raw in reference]
    yield _levelled(
        "flask difficulty",
        "ordinal",
        [(_row(raw, "flask"), level) for raw, level in zip(reference, levels, strict=True)],
    )
    strong, weak = ({raw["prompt"]: raw for raw in rows if raw["model"] == model} for model in ("gpt4", "alpaca_13b"))
    both = sampled([raw for prompt, raw in strong.items() if prompt in weak], limit // 2)
    yield _paired("gpt-4 over alpaca-13b", [(_row(raw, "flask"), _row(weak[raw["prompt"]], "flask")) for raw in both])


def _reasoning(traces: list[Raw], solutions: list[Raw], instructions: list[Raw], limit: int) -> Iterator[Contrast]:
    """Traces of a reasoning model, on hard and on easy questions, against plain solutions and against curated instructions."""
    hard, easy = (
        [_row(raw, "traces") for raw in sampled([r for r in traces if r["in_gsm8k_test"] == is_easy], limit)] for is_easy in (False, True)
    )  # fmt: skip
    plain = {raw["prompt"].strip(): _row(raw, "gsm8k") for raw in solutions if raw["split"] == "test"}
    single = [_row(raw, "lima") for raw in sampled([r for r in instructions if r["n_turns"] == 2], limit)]
    yield _levelled(
        "s1 traces over gsm8k traces", "classes", [(row, 1.0) for row in hard] + [(row, 0.0) for row in easy]
    )
    yield _levelled(
        "r1 traces over instructions", "classes", [(row, 1.0) for row in hard + easy] + [(row, 0.0) for row in single]
    )
    yield _paired(
        "r1 trace over plain solution",
        [(row, plain[row.prompt.strip()]) for row in easy if row.prompt.strip() in plain],
    )


MAKERS: dict[tuple[str, ...], Callable[..., Iterator[Contrast]]] = {
    ("car_expert_revised",): _expert_revised,
    ("layer_gradient_cot",): _chains_of_thought,
    ("alpaca_union_labeled",): _alpaca,
    ("math_levels",): _math,
    ("flask_difficulty_skill",): _flask,
    ("reasoning_r1_400", "gsm8k", "lima"): _reasoning,
}
