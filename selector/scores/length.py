"""Length control: what a score says beyond what the lengths of prompt and completion already say.

The rank of a sample's gradient is at most its number of tokens, and the norm of a mean loss shrinks with it, so a raw
score mostly restates length. A control is fitted on one pool and is a small value of plain numbers: it is saved with
the scores and applied unchanged to samples that are added later, or to another pool.

    spline      residual of the log score on natural cubic splines of log prompt, log completion and log total tokens.
                Beyond the fitted range they go on as straight lines, so longer samples are extrapolated with care.
    bins        z-score of the log score among samples of like completion and prompt length (matched quantile bins).
                Assumes no shape, but is coarse: a trend within a bin remains.
    per-token   score divided by loss tokens; the plainest, and wrong unless the score grows in proportion to length.
    none        the raw score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from selector.errors import ConfigError, did_you_mean

MAX_KNOTS = 6
"""Knots of each spline in a large pool; six follow the bend at the truncation length and little else."""
SAMPLES_PER_KNOT = 25
"""A small pool gets fewer knots, down to the two of a straight line."""
RIDGE = 1e-10
"""Share of the mean diagonal added to the normal equations, which the three related lengths leave nearly singular."""
BLOCK = 1 << 18
"""Rows whose basis is held at a time."""
BINS = 10
"""Quantile bins of completion length, and of prompt length within each."""


@dataclass(frozen=True)
class LengthControl(ABC):
    """A control that was fitted on some pool."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(
        cls, raw: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"], completion: Int[np.ndarray, " N"]
    ) -> LengthControl:
        """Fit on a pool; samples whose raw score is missing or not positive are left out.

        Args:
            raw: the score, > 0.
            prompt: tokens without loss.
            completion: tokens with loss.
        """

    @abstractmethod
    def apply(
        self, raw: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"], completion: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """The controlled score; NaN where the raw one is missing or not positive.

        Args:
            raw: the score, > 0.
            prompt: tokens without loss.
            completion: tokens with loss.
        """

    @abstractmethod
    def restore(
        self, controlled: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"], completion: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """The raw score that `apply` makes a controlled one of, at the given lengths.

        Args:
            controlled: the controlled score; NaN stays.
            prompt: tokens without loss.
            completion: tokens with loss.
        """

    def to_dict(self) -> dict[str, Any]:
        """The fit as plain values for JSON."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class NoControl(LengthControl):
    """The raw score itself."""

    kind = "none"

    @classmethod
    def fit(cls, raw, prompt, completion) -> NoControl:
        return cls()

    def apply(self, raw, prompt, completion):
        return np.where(np.isfinite(raw), raw, np.nan)

    def restore(self, controlled, prompt, completion):
        return controlled


@dataclass(frozen=True)
class PerToken(LengthControl):
    """Score divided by the number of loss tokens."""

    kind = "per-token"

    @classmethod
    def fit(cls, raw, prompt, completion) -> PerToken:
        return cls()

    def apply(self, raw, prompt, completion):
        return np.where(np.isfinite(raw) & (completion > 0), raw / np.maximum(completion, 1), np.nan)

    def restore(self, controlled, prompt, completion):
        return np.where(completion > 0, controlled * completion, np.nan)


@dataclass(frozen=True)
class SplineControl(LengthControl):
    """Residual of the log score on natural cubic splines of log(1 + tokens) of prompt, completion and both together."""

    kind = "spline"

    knots: list[list[float]]
    """Knots of the three splines, log(1 + tokens), ascending; fewer than two where that length does not vary."""
    coefficients: list[float]
    """Intercept, then the coefficients of each spline."""
    explained: float
    """Share of the variance of the log score in the fitted pool that length explains."""

    @classmethod
    def fit(cls, raw, prompt, completion) -> SplineControl:
        valid = _positive(raw)
        log_score = np.log(raw[valid])
        lengths = _lengths(prompt[valid], completion[valid])
        n_knots = int(np.clip(len(log_score) // SAMPLES_PER_KNOT, 2, MAX_KNOTS))
        levels = np.linspace(0.02, 0.98, n_knots)
        knots = [np.unique(np.log1p(np.quantile(x, levels))).tolist() if len(x) else [] for x in lengths]
        tables = _basis_tables(lengths, knots)
        width = 1 + sum(table.shape[1] for table in tables)
        gram, right = np.zeros((width, width)), np.zeros(width)
        for first in range(0, max(len(log_score), 1), BLOCK):
            rows = slice(first, first + BLOCK)
            parts = [table[x[rows]] for table, x in zip(tables, lengths, strict=True)]
            design = np.concatenate([np.ones((len(log_score[rows]), 1)), *parts], axis=1)
            gram, right = gram + design.T @ design, right + design.T @ log_score[rows]
        penalty = RIDGE * max(np.trace(gram) / width, 1e-300)
        coefficients = np.linalg.solve(gram + penalty * np.eye(width), right)
        variance = float(np.var(log_score)) if len(log_score) else 0.0
        left = np.var(log_score - _expected(lengths, knots, coefficients)) if variance > 0 else 0.0
        return cls(knots, coefficients.tolist(), 1 - float(left) / variance if variance > 0 else 0.0)

    def apply(self, raw, prompt, completion):
        valid = _positive(raw)
        controlled = np.full(len(raw), np.nan)
        lengths = _lengths(prompt[valid], completion[valid])
        controlled[valid] = np.log(raw[valid]) - _expected(lengths, self.knots, np.asarray(self.coefficients))
        return controlled

    def restore(self, controlled, prompt, completion):
        return np.exp(controlled + _expected(_lengths(prompt, completion), self.knots, np.asarray(self.coefficients)))


@dataclass(frozen=True)
class BinControl(LengthControl):
    """z-score of the log score within matched bins of completion length and of prompt length."""

    kind = "bins"

    completion_edges: list[float]
    """Upper edges of the bins of completion length, the last bin being open."""
    prompt_edges: list[list[float]]
    """For each of them, upper edges of its bins of prompt length."""
    means: list[list[float]]
    """Mean log score by completion bin and prompt bin."""
    deviations: list[list[float]]
    """Standard deviation of the log score, 1 where a bin holds no two different scores."""

    @classmethod
    def fit(cls, raw, prompt, completion) -> BinControl:
        valid = _positive(raw)
        log_score, prompt, completion = np.log(raw[valid]), prompt[valid], completion[valid]
        n_bins = int(np.clip(np.sqrt(len(log_score) / SAMPLES_PER_KNOT), 1, BINS))
        completion_edges = _edges(completion, n_bins)
        outer = np.searchsorted(completion_edges, completion)
        prompt_edges, means, deviations = [], [], []
        for i in range(len(completion_edges) + 1):
            scores, prompts = log_score[outer == i], prompt[outer == i]
            edges = _edges(prompts, n_bins)
            inner = np.searchsorted(edges, prompts)
            groups = [scores[inner == j] for j in range(len(edges) + 1)]
            prompt_edges.append(edges)
            means.append([float(group.mean()) if len(group) else 0.0 for group in groups])
            deviations.append([float(group.std()) or 1.0 if len(group) else 1.0 for group in groups])
        return cls(completion_edges, prompt_edges, means, deviations)

    def apply(self, raw, prompt, completion):
        valid = _positive(raw)
        mean, deviation = self._of_bins(prompt[valid], completion[valid])
        controlled = np.full(len(raw), np.nan)
        controlled[valid] = (np.log(raw[valid]) - mean) / deviation
        return controlled

    def restore(self, controlled, prompt, completion):
        mean, deviation = self._of_bins(prompt, completion)
        return np.exp(controlled * deviation + mean)

    def _of_bins(
        self, prompt: Int[np.ndarray, " N"], completion: Int[np.ndarray, " N"]
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Mean and standard deviation of the log score in each sample's bin."""
        mean, deviation = np.empty(len(prompt)), np.empty(len(prompt))
        outer = np.searchsorted(self.completion_edges, completion)
        for i, edges in enumerate(self.prompt_edges):
            members = np.flatnonzero(outer == i)
            inner = np.searchsorted(edges, prompt[members])
            mean[members], deviation[members] = np.asarray(self.means[i])[inner], np.asarray(self.deviations[i])[inner]
        return mean, deviation


CONTROLS: dict[str, type[LengthControl]] = {cls.kind: cls for cls in (SplineControl, BinControl, PerToken, NoControl)}


def control_class(kind: str) -> type[LengthControl]:
    """Look up a kind of control; `"length"` means the spline, which is the default everywhere.

    Args:
        kind: spline (or length), bins, per-token, none.

    Raises:
        ConfigError: there is no such kind.
    """
    kind = "spline" if kind == "length" else kind
    if kind not in CONTROLS:
        raise ConfigError(
            "unknown length control",
            got=kind,
            allowed=", ".join(["length", *CONTROLS]),
            fix=did_you_mean(kind, CONTROLS) or None,
        )
    return CONTROLS[kind]


def load_control(values: Mapping[str, Any]) -> LengthControl:
    """Rebuild a control from the plain values of its `to_dict`.

    Args:
        values: kind and fitted numbers, as found in a score's provenance.
    """
    return control_class(values["kind"])(**{name: value for name, value in values.items() if name != "kind"})


def _positive(raw: Float[np.ndarray, " N"]) -> np.ndarray:
    return np.isfinite(raw) & (raw > 0)


def _lengths(prompt: Int[np.ndarray, " N"], completion: Int[np.ndarray, " N"]) -> list[Int[np.ndarray, " N"]]:
    return [prompt, completion, np.add(prompt, completion)]


def _basis_tables(lengths: list[Int[np.ndarray, " N"]], knots: list[list[float]]) -> list[Float[np.ndarray, "M _"]]:
    """The basis of each spline at every whole number of tokens that occurs: to look up is faster than to evaluate."""
    tables = []
    for x, own in zip(lengths, knots, strict=True):
        every = np.log1p(np.arange(int(x.max(initial=0)) + 1))
        tables.append(natural_spline(every, np.asarray(own)) if len(own) > 1 else np.zeros((len(every), 0)))
    return tables


def _expected(
    lengths: list[Int[np.ndarray, " N"]], knots: list[list[float]], coefficients: Float[np.ndarray, " C"]
) -> Float[np.ndarray, " N"]:
    expected, first = np.full(len(lengths[0]), coefficients[0]), 1
    for x, table in zip(lengths, _basis_tables(lengths, knots), strict=True):
        expected += (table @ coefficients[first : first + table.shape[1]])[x]
        first += table.shape[1]
    return expected


def natural_spline(x: Float[np.ndarray, " N"], knots: Float[np.ndarray, " K"]) -> Float[np.ndarray, "N K-1"]:
    """Basis of natural cubic splines without the constant: cubic between the knots, straight beyond the outer two.

    Args:
        x: where to evaluate.
        knots: K >= 2, strictly ascending.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, equations 5.4 and 5.5.
    """
    u, k = (x - knots[0]) / (knots[-1] - knots[0]), (knots - knots[0]) / (knots[-1] - knots[0])

    def d(j: int) -> Float[np.ndarray, " N"]:
        return (np.maximum(u - k[j], 0) ** 3 - np.maximum(u - k[-1], 0) ** 3) / (k[-1] - k[j])

    last = d(len(k) - 2)
    return np.stack([u, *(d(j) - last for j in range(len(k) - 2))], axis=1)


def _edges(lengths: Int[np.ndarray, " N"], n_bins: int) -> list[float]:
    """Inner quantiles that split a pool in bins of like size; fewer where lengths repeat."""
    if len(lengths) == 0 or n_bins < 2:
        return []
    return np.unique(np.quantile(lengths, np.linspace(0, 1, n_bins + 1)[1:-1])).tolist()
