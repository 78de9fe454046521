"""Pools of real rows with noise at known rates, and clean rows to judge by that are never in a pool.

A development pool and a test pool share no row. Evaluation rows come from the test split of their source where it has one.
No prompt is used twice, and none is one of an evaluation set, by its letters and digits in lower case. Noise is made of
rows that are not in the pool otherwise, except that near-duplicates copy clean rows of it:

    shuffled         the answer of another row of the same source, of like length
    truncated        the first fifth to three fifths of the answer's words
    off_topic        the answer of a row of another source, of like length
    near_duplicate   three copies of one row, each with one or two small edits

Answers too short to be cut are shuffled instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]

NOISE_SHARES = {"shuffled": 0.1, "truncated": 0.1, "off_topic": 0.1, "near_duplicate": 0.1}
"""Share of the rows of each source that each kind of noise has."""
COPIES = 3
"""Near-duplicates of one row."""
TRUNCATED_FROM = 8
"""Words of the shortest answer that is cut."""
LONGEST = 512
"""Tokens of the longest row, end token included."""
OPEN_LICENSES = ("MIT", "Apache-2.0", "CC0")
COMMONSENSE = ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")


@dataclass(frozen=True)
class Source:
    """Rows of one kind in one file of the data directory."""

    file: str
    """Name without `.jsonl` or `.jsonl.zst`."""
    trains: Callable[[Row], bool]
    """Which rows may be in a pool."""
    tests: Callable[[Row], bool] | None = None
    """Which rows are for evaluation; some of the others, held out, when None."""


SOURCES = {
    "gsm8k": Source("gsm8k", lambda row: row["split"] == "train", lambda row: row["split"] == "test"),
    "math": Source(
        "math_levels",
        lambda row: row["has_solution"] and row["split"] == "math_test_minus_500",
        lambda row: row["has_solution"] and row["split"] == "math500",
    ),
    "dolly": Source("dolly3k_high", lambda row: True),
    "chat": Source(
        "instruct_misc", lambda row: row["license"] in OPEN_LICENSES and row["category"] not in ("codegen", "toolformer")
    ),
    "code": Source("instruct_misc", lambda row: row["license"] in OPEN_LICENSES and row["category"] == "codegen"),
    "commonsense": Source(
        "commonsense_math_tasks",
        lambda row: row["split"] == "train" and row["task"] in COMMONSENSE,
        lambda row: row["split"] == "test" and row["task"] in COMMONSENSE,
    ),
    "trivia": Source("trivia_mc", lambda row: True),
    "t0": Source("t0_p3_50k", lambda row: True),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How many rows each part has."""

    test: int = 6000
    """Rows of the test pool."""
    development: int = 3000
    """Rows of the development pool."""
    evaluation: int = 100
    """Evaluation rows of each source, for each pool."""
    target: int = 8
    """Clean rows of each source that target-matched methods see, for each pool."""
    questions: int = 250
    """Questions of each choice task."""


def read_rows(folder: Path, name: str) -> Iterator[Row]:
    """Rows of a JSONL file of the data directory, compressed or not; none where there is no such file."""
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.zst"
    if plain.exists():
        text = plain.read_bytes()
    elif packed.exists():
        with pa.CompressedInputStream(pa.OSFile(str(packed)), "zstd") as stream:
            text = stream.read()
    else:
        return
    yield from (json.loads(line) for line in text.split(b"\n") if line)


def normalized(prompt: str) -> str:
    """Letters and digits of a prompt in lower case."""
    return re.sub(r"\W+", "", prompt).lower()


def forbidden_prompts(folder: Path) -> set[str]:
    """Normalized prompts of everything that is there for evaluation."""
    names = {path.name.split(".")[0] for path in folder.glob("eval_*.jsonl*")}
    found = {normalized(row.get("prompt", "")) for name in names for row in read_rows(folder, name)}
    for source in SOURCES.values():
        if source.tests:
            found |= {normalized(row["prompt"]) for row in read_rows(folder, source.file) if source.tests(row)}
    return found


def build(folder: Path, sizes: Sizes, n_tokens: Callable[[str, str], int], seed: int = 0) -> dict[str, list[Row]]:
    """Draw all parts.

    Args:
        folder: the data directory; sources without a file in it are left out.
        sizes: how many rows each part has.
        n_tokens: tokens of a prompt and its completion.
        seed: of all draws.

    Returns:
        Rows (id, source, prompt, completion, noise, copy_of) of `test`, `development`, and for each of them `*_evaluation`
        and `*_target`, which are clean.

    Raises:
        ValueError: the directory has no source, or a source has too few rows.
    """
    rng = np.random.default_rng(seed)
    present = {name: source for name, source in SOURCES.items() if any(True for _ in read_rows(folder, source.file))}
    if not present:
        files = ", ".join(sorted({f"{source.file}.jsonl[.zst]" for source in SOURCES.values()}))
        raise ValueError(f"{folder} has none of {files}: name the data directory")
    used = forbidden_prompts(folder)
    parts: dict[str, list[Row]] = {}
    asked: set[str] = set()
    tests = {
        name: _rows(folder, name, source.tests, asked, n_tokens, rng)
        for name, source in present.items()
        if source.tests
    }
    trains = {name: _rows(folder, name, source.trains, used, n_tokens, rng) for name, source in present.items()}
    for pool, size in (("test", sizes.test), ("development", sizes.development)):
        clean = {name: _take(tests.get(name, trains[name]), sizes.evaluation, name) for name in present}
        parts[f"{pool}_evaluation"] = [row for rows in clean.values() for row in rows]
        parts[f"{pool}_target"] = [row for name in present for row in _take(trains[name], sizes.target, name)]
        parts[pool] = _mixed(trains, size // len(present), rng)
    return parts


def _rows(
    folder: Path,
    name: str,
    wanted: Callable[[Row], bool],
    used: set[str],
    n_tokens: Callable[[str, str], int],
    rng: np.random.Generator,
) -> Iterator[Row]:
    """Rows of a source in random order that fit, each prompt once; `used` learns their prompts."""
    found = [row for row in read_rows(folder, SOURCES[name].file) if wanted(row) and row["completion"].strip()]
    for i in rng.permutation(len(found)).tolist():
        prompt, completion = found[i]["prompt"].strip() + "\n", found[i]["completion"].strip()
        key = normalized(prompt)
        if key in used or n_tokens(prompt, completion) > LONGEST:
            continue
        used.add(key)
        kept = {"id": found[i]["id"], "source": name, "prompt": prompt, "completion": completion}
        yield kept | {"noise": "", "copy_of": ""}


def _take(rows: Iterator[Row], count: int, name: str) -> list[Row]:
    """The next rows of a source, which are then gone."""
    taken = list(islice(rows, count))
    if len(taken) < count:
        raise ValueError(f"{name} has {len(taken)} rows left where {count} are needed: ask for fewer")
    return taken


def _mixed(sources: dict[str, Iterator[Row]], count: int, rng: np.random.Generator) -> list[Row]:
    """A pool with `count` rows of each source, noise among them, in random order."""
    pool: list[Row] = []
    off_topic: list[Row] = []
    for name, rows in sources.items():
        copies = round(NOISE_SHARES["near_duplicate"] * count / COPIES)
        base = _take(rows, count - copies * COPIES, name)
        order = sorted(
            base, key=lambda row: len(row["completion"].split()) < TRUNCATED_FROM
        )  # those that can be cut first
        cut = min(
            round(NOISE_SHARES["truncated"] * count),
            sum(len(row["completion"].split()) >= TRUNCATED_FROM for row in base),
        )
        astray = round(NOISE_SHARES["off_topic"] * count)
        wrong = round((NOISE_SHARES["shuffled"] + NOISE_SHARES["truncated"]) * count) - cut
        for row in order[:cut]:
            row |= {"noise": "truncated", "completion": _beginning(row["completion"], rng)}
        rest = rng.permutation(np.array(order[cut:], dtype=object)).tolist()
        _exchange(rest[:wrong], "shuffled", lambda one, other: one["completion"] != other["completion"])
        off_topic += rest[wrong : wrong + astray]
        clean = rest[wrong + astray :]
        pool += base
        pool += [_edited(row, i, rng) for row in clean[:copies] for i in range(COPIES)]
    _exchange(off_topic, "off_topic", lambda one, other: one["source"] != other["source"])
    return [pool[i] for i in rng.permutation(len(pool)).tolist()]


def _exchange(rows: list[Row], noise: str, fits: Callable[[Row, Row], bool]) -> None:
    """Give each row the completion of the next longer one that fits, the longest ones those of the shortest."""
    rows = sorted(rows, key=lambda row: len(row["completion"]))
    given = []
    for i, row in enumerate(rows):
        others = (rows[(i + j) % len(rows)] for j in range(1, len(rows)))
        given.append(next((other["completion"] for other in others if fits(row, other)), None))
    for row, completion in zip(rows, given, strict=True):
        if completion is not None:
            row |= {"noise": noise, "completion": completion}


def _beginning(text: str, rng: np.random.Generator) -> str:
    """The first fifth to three fifths of a text's words."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[int(rng.uniform(0.2, 0.6) * len(ends))]]


def _edited(row: Row, number: int, rng: np.random.Generator) -> Row:
    """A near-duplicate: one word of the answer, or of the question if the answer is short, left out, doubled or in capitals."""
    where = "completion" if len(row["completion"].split()) >= TRUNCATED_FROM else "prompt"
    words = [match.span() for match in re.finditer(r"\S+", row[where])]
    start, end = words[int(rng.integers(len(words)))]
    word = row[where][start:end]
    changed = (f"{word} {word}", word.upper(), word + ",")[number % 3]
    text = row[where][:start] + changed + row[where][end:]
    return row | {"id": f"{row['id']}~{number}", where: text, "noise": "near_duplicate", "copy_of": row["id"]}


def choice_tasks(
    folder: Path, sizes: Sizes, taken: set[str], n_tokens: Callable[[str, str], int], seed: int = 0
) -> list[Row]:
    """Questions with one right answer among a few, as task, prompt, choices and the position of the right one.

    Args:
        folder: the data directory.
        sizes: how many questions of each task.
        taken: normalized prompts of all other parts, which are not asked.
        n_tokens: tokens of a prompt and a choice.
        seed: of the draw.
    """
    readers: dict[str, tuple[str, Callable[[Row], tuple[list[str], str] | None]]] = {
        "trivia": ("trivia_mc", _trivia_choices),
        "commonsense": ("commonsense_math_tasks", _commonsense_choices),
        "mmlu": ("eval_mmlu", lambda row: (list("ABCD"), row["completion"]) if row["split"] == "test" else None),
    }
    questions = []
    for task, (file, read) in readers.items():
        rows = list(read_rows(folder, file))
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        kept: list[Row] = []
        for row in (rows[i] for i in order):
            found, prompt = read(row), row["prompt"].strip() + "\n"
            if len(kept) == sizes.questions:
                break
            if found is None or found[1] not in found[0] or normalized(prompt) in taken:
                continue
            if max(n_tokens(prompt, choice) for choice in found[0]) <= LONGEST:
                kept.append({"task": task, "prompt": prompt, "choices": found[0], "right": found[0].index(found[1])})
        questions += kept
    return questions


def _trivia_choices(row: Row) -> tuple[list[str], str]:
    return re.findall(r"^[A-D]\. .*$", row["prompt"], re.MULTILINE), row["completion"]


def _commonsense_choices(row: Row) -> tuple[list[str], str] | None:
    form = re.search(r"Answer format: (\S+)$", row["prompt"])
    if row["split"] != "test" or row["task"] not in COMMONSENSE or form is None:
        return None
    return [f"the correct answer is {name}" for name in form[1].split("/")], row["completion"]
