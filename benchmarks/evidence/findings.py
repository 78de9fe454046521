"""What each score says of each contrast under one model, and in which words.

A score's verdict on a contrast, by the sign that `expectations.yaml` wrote down beforehand:

    holds         with length taken out, the interval lies on the expected side of 0.5
    length only   it does so raw, on rows as they are, and no longer when length is taken out
    wrong sign    with length taken out, the interval lies on the other side
    nothing       none of these
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import yaml
from bootstrap import Order, concordance, paired, resamples
from contrasts import Contrast, near_pairs
from jaxtyping import Float, Int
from measured import CONTROLS, Measured

RESAMPLES = 1000
CALIPER = 0.15
"""Largest difference of log tokens, of prompts and of completions, of rows that count as of one length."""
FAR = 1 / 3
"""Shares of rows that lie between the levels of two rows, at least, before they are matched: all classes, and levels that are apart."""
FEWEST = 30
"""Pairs that a length-matched version needs."""
HALVES = ("development", "test")
CONTROL = "spline"
"""The control that verdicts are about; others are reported beside it."""
EXPECTATIONS = Path(__file__).with_name("expectations.yaml")


@dataclass(frozen=True, eq=False)
class View:
    """One half of a contrast, as it is or matched by length."""

    contrast: Contrast
    half: str
    matched: bool
    """Whether what is compared is of like length."""
    rows: Int[np.ndarray, " N"]
    """Which rows of the contrast belong to it; of pairs, the better and the worse one in turn."""
    positions: Int[np.ndarray, " N"]
    """Where they are among the measured rows."""
    groups: np.ndarray
    """What each row, or each pair, is resampled with."""
    in_pairs: bool

    @cached_property
    def weights(self) -> Float[np.ndarray, "B+1 U"]:
        """Resamples of the view's groups."""
        return resamples(self.groups, RESAMPLES)

    @property
    def size(self) -> str:
        """For tables."""
        return f"{len(self.rows) // 2} pairs" if self.in_pairs else f"{len(self.rows)} rows"

    def order(self, scores: Float[np.ndarray, " M"], resample: bool = True) -> Order:
        """How scores of all measured rows order the view's rows.

        Args:
            scores: of all measured rows.
            resample: whether an interval is wanted, which is what takes time.
        """
        own, weights = scores[self.positions], self.weights if resample else self.weights[:1]
        if self.in_pairs:
            return paired(own[0::2], own[1::2], weights)
        return concordance(own, np.array(self.contrast.levels)[self.rows], weights)

    def part(self, name: str) -> View:
        """The pairs of one part of the contrast."""
        keep = np.array(self.contrast.parts)[self.rows] == name
        groups = self.groups[keep[0::2] if self.in_pairs else keep]
        return View(
            self.contrast, self.half, self.matched, self.rows[keep], self.positions[keep], groups, self.in_pairs
        )


def views(contrast: Contrast, measured: Measured) -> list[View]:
    """Both halves of a contrast as they are, and length-matched where enough pairs are found.

    Pairs of a paired contrast stay as they are and are left out where the lengths differ. Rows of the other kinds are paired with the
    nearest row of another class, or of a level that is apart, each once.

    Args:
        contrast: any.
        measured: gives the lengths, in the model's own tokens.
    """
    positions = measured.at(contrast.rows)
    lengths = np.log1p(measured.lengths()[positions])
    groups = np.array(contrast.groups)
    in_pairs = contrast.kind == "paired"
    found = []
    for half in HALVES:
        own = np.flatnonzero([row.is_test == (half == "test") for row in contrast.rows])
        if len(np.unique(np.array(contrast.levels)[own])) < 2:
            continue  # in small samples a half can lack a class
        found.append(
            View(contrast, half, False, own, positions[own], groups[own[::2]] if in_pairs else groups[own], in_pairs)
        )
        if in_pairs:
            like = np.abs(lengths[own[0::2], 1] - lengths[own[1::2], 1]) <= CALIPER
            pairs, unit = own[np.repeat(like, 2)], groups[own[::2]][like]
        else:
            pairs = own[_matched(lengths[own], np.array(contrast.levels)[own])]
            unit = np.arange(len(pairs) // 2)
        if len(unit) >= FEWEST:
            found.append(View(contrast, half, True, pairs, positions[pairs], unit, True))
    return found


def _matched(lengths: Float[np.ndarray, "N 2"], levels: Float[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Higher and lower row in turn of pairs of like prompt and completion length."""
    ranks = (np.searchsorted(np.sort(levels), levels) + np.searchsorted(np.sort(levels), levels, "right")) / (
        2 * len(levels)
    )
    distance = np.abs(lengths[:, None] - lengths).max(-1)
    pairs = near_pairs(np.where(ranks[:, None] - ranks >= FAR, distance, np.inf), CALIPER)
    return np.array(pairs, dtype=np.int64).reshape(-1)


def headline(own: Sequence[View], half: str) -> View:
    """The length-matched view of a half, else the half as it is.

    Args:
        own: views of one contrast.
        half: which.
    """
    return max((view for view in own if view.half == half), key=lambda view: view.matched)


@dataclass(frozen=True)
class Finding:
    """What one score says of one contrast under one model, on one view."""

    contrast: str
    half: str
    matched: bool
    score: str
    control: str
    auc: float
    low: float
    high: float
    rows: int

    @property
    def side(self) -> int:
        """1 where the interval lies above 0.5, -1 where it lies below, else 0."""
        return int(self.low > 0.5) - int(self.high < 0.5)


def pool_of(contrast: Contrast, rows_by_source: dict[str, Int[np.ndarray, " M"]]) -> Int[np.ndarray, " M"]:
    """Positions of all measured rows of a contrast's data sets."""
    return np.sort(np.concatenate([rows_by_source[source] for source in contrast.sources]))


def find(measured: Measured, every: Sequence[Sequence[View]], pools: Sequence[Int[np.ndarray, " M"]]) -> list[Finding]:
    """Every score under every control on every view; intervals on the test halves, of parts of the model raw and under `CONTROL`.

    Args:
        measured: scores of one model.
        every: views of each contrast.
        pools: rows that the controls of each contrast are fitted on.
    """
    found = []
    for own, pool in zip(every, pools, strict=True):
        for name in measured.raw:
            for control in CONTROLS:
                values = measured.controlled(name, control, pool)
                for view in own:
                    order = view.order(
                        values, view.half == "test" and ("," not in name or control in ("none", CONTROL))
                    )
                    key = (view.contrast.name, view.half, view.matched, name, control)
                    found.append(Finding(*key, order.value, *order.interval, order.rows))
    return found


@cache
def _expectations() -> dict:
    return yaml.safe_load(EXPECTATIONS.read_text(encoding="utf-8"))


def expected_sign(score: str, contrast: str) -> int:
    """What was written down beforehand: 1, -1, or 0 for nothing.

    Args:
        score: `measure` or `measure, part`.
        contrast: its name.
    """
    measure = score.split(",")[0]
    exception = _expectations()["exceptions"].get(contrast, {}).get(measure)
    return (exception or _expectations()["scores"][measure])["sign"]


def verdict(raw: Finding, controlled: Finding, sign: int) -> str:
    """In the words of the module.

    Args:
        raw: on the rows as they are, without control.
        controlled: with length taken out.
        sign: the expected one.
    """
    if sign == 0:
        return "nothing expected"
    side = sign * controlled.side
    if side:
        return "holds" if side > 0 else "wrong sign"
    return "length only" if sign * raw.side > 0 else "nothing"
