"""Ways to select from a pool, by name: what each looks at, and what a sample's look costs.

A name says the direction of the measure itself: `high loss` picks where the loss is high, whatever a paper recommends. All
XX
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy import ndarray as Array

from selector.index import GradientIndex
from selector.scores import Aggregation, combine, score
from selector.selecting import select
from selector.selection import Selection
from selector.store import FeatureStore
from selector.types import Scores

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
FORWARD = ("ifd", "hidden_effective_rank", "angle_concentration", "logit_nuclear_norm")
"""Scores that need forward passes alone, and must be asked for."""
SPECTRA = ("effective_rank", "nuclear_norm", "frobenius_norm", "stable_rank")
RIDGE = 1e-2
"""Of the combination's fit, as a share of the number of samples."""
SHOWN_NEIGHBOURS = 10
"""Nearest gradients whose mean cosine is a score."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A scored pool and a few clean examples of what the training should make better."""

    store: FeatureStore
    """Of the pool, with spectra, sketches and the scores of `FORWARD`."""
    target: FeatureStore
    """Of the examples, with sketches."""

    @cached_property
    def plain(self) -> Scores:
        """Scores that no method looks at: ids, lengths and sources."""
        return score(self.store, "loss", control="none")

    @cache  # noqa: B019  # lives as long as the run
    def scored(self, by: str, high: bool = True, control: str = "length", projections: tuple[str, ...] = ()) -> Scores:
        """A score of which high values are picked first, or low ones."""
        return score(
            self.store, by, control=control, aggregation=Aggregation(projections=projections), higher_first=high
        )

    @cached_property
    def sketches(self) -> Array:
        """[N, D] direction of each sample's gradient, every matrix of the same length."""
        return directions(self.store)

    @cached_property
    def target_sketches(self) -> Array:
        """[M, D] the same of the examples."""
        return directions(self.target)

    @cached_property
    def spectra_index(self) -> GradientIndex:
        """Neighbours by standardized spectra."""
        return GradientIndex.build(self.store)

    @cached_property
    def sketch_index(self) -> GradientIndex:
        """Neighbours by direction of the gradient."""
        return GradientIndex.from_vectors(self.plain.ids, self.sketches)

    def valued(self, values: Array) -> Scores:
        """Numbers of this pool as scores."""
        return replace(self.plain, values=values, raw=values, provenance={})

    @cached_property
    def ingredients(self) -> dict[str, Scores]:
        """What combinations are made of."""
        found = {
            f"{by}, {part}": self.scored(by, projections=projections)
            for by in SPECTRA
            for part, projections in (("attention", ATTENTION), ("MLP", MLP))
        }
        found["loss"] = self.scored("loss")
        lists = self.sketch_index.graph(SHOWN_NEIGHBOURS)
        near = lists.similarities.reshape(len(lists), -1)
        found["nearest gradient"] = self.valued(near[:, 0].astype(float))
        found["ten nearest gradients"] = self.valued(near.mean(axis=1, dtype=float))
        return found


def directions(store: FeatureStore) -> Array:
    """[N, D] float32 sketches, each matrix's of length one; zeros where there is none."""
    sketches = np.nan_to_num(store.sketches())
    lengths = np.linalg.norm(sketches, axis=-1, keepdims=True)
    return (sketches / np.where(lengths > 0, lengths, 1)).reshape(len(sketches), -1).astype(np.float32)


PARTS: dict[str, Callable[[str], bool]] = {
    "combination": lambda name: True,
    "combination of spectra": lambda name: "," in name,
    "combination without spectra": lambda name: "," not in name,
    "combination without loss": lambda name: name != "loss",
    "combination without neighbours": lambda name: "gradient" not in name,
}
"""Which ingredients each combination has."""


def fit_combination(ingredients: Mapping[str, Scores], clean: Array) -> dict[str, float]:
    """Weights with which z-scores tell clean samples from noise: ridge regression of the label.

    Args:
        ingredients: scores of the development pool by name.
        clean: [N] bool, in rows of the pool.
    """
    first = next(iter(ingredients.values()))
    columns = np.stack([one.values for one in ingredients.values()], axis=1)
    known = np.isfinite(columns).all(axis=1)
    x, y = columns[known], clean[first.rows][known].astype(float)
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    gram = z.T @ z + RIDGE * len(z) * np.eye(z.shape[1])
    return dict(zip(ingredients, np.linalg.solve(gram, z.T @ (y - y.mean())).tolist(), strict=True))


@dataclass(frozen=True)
class Method:
    """A way to select."""

    select: Callable[[Scored, str, int], Selection]
    """From a scored pool, a budget and a seed."""
    cost: str
    """What has to be computed for each sample, one of `COSTS`."""
    draws: bool = False
    """Whether another seed gives another selection."""


COSTS = {
    "nothing": (),
    "loss": ("loss",),
    **{name: ("loss", name) for name in FORWARD},
    "spectra": ("spectra",),
    "spectra, sketches": ("spectra",),
}
"""Scorers of each kind of work."""


def methods(weights: Mapping[str, Mapping[str, float]]) -> dict[str, Method]:
    """All methods, the most important first.

    Args:
        weights: of each combination in `PARTS`, fitted on the development pool.
    """
    found = {
        "random": Method(
            lambda pool, budget, seed: select(pool.plain, None, budget, "random", seed=seed), "nothing", True
        )
    }

    def both(name: str, by: str, cost: str, control: str = "length", policy: str = "top") -> dict[str, Method]:
        def chosen(high: bool) -> Callable[[Scored, str, int], Selection]:
            return lambda pool, budget, seed: select(pool.scored(by, high, control), None, budget, policy, seed=seed)

        return {f"high {name}": Method(chosen(True), cost), f"low {name}": Method(chosen(False), cost)}

    def combined(name: str, policy: str = "top", **options: Any) -> Callable[[Scored, str, int], Selection]:
        def chosen(pool: Scored, budget: str, seed: int) -> Selection:
            parts = {part: pool.ingredients[part] for part in weights[name]}
            values = combine(parts, weights[name], how="z")
            index = pool.sketch_index if policy == "deduplicate" else None
            return select(values, None, budget, policy, index=index, seed=seed, **options)

        return chosen

    for by in ("effective_rank", "nuclear_norm", "loss"):
        cost = "loss" if by == "loss" else "spectra"
        found |= both(by, by, cost) | both(f"{by}{WITHIN}", by, cost, policy="proportional")
    found["combination"] = Method(combined("combination"), "spectra, sketches")
    found[f"combination{WITHIN}"] = Method(combined("combination", "proportional"), "spectra, sketches")
    found["target, mean cosine"] = Method(_target_mean, "spectra, sketches")
    found["target, best rank"] = Method(_target_best, "spectra, sketches")
    for part in PARTS:
        found.setdefault(part, Method(combined(part), "spectra, sketches"))
    found["combination, deduplicated"] = Method(
        combined("combination", "deduplicate", threshold=DUPLICATE), "spectra, sketches"
    )
    for policy, name in (
        ("deduplicate", "high effective_rank, deduplicated"),
        ("facility-location", "diverse, facility location"),
        ("k-center", "diverse, k-center"),
    ):
        found[name] = Method(_by_sketches(policy), "spectra, sketches")
    for by in ("frobenius_norm", "stable_rank"):
        found |= both(by, by, "spectra")
    for by in FORWARD:
        found |= both(by, by, by)
    for by in ("effective_rank", "nuclear_norm"):
        found |= both(f"{by}, raw", by, "spectra", "none")
    return found | both("n_tokens", "n_tokens", "nothing")


DUPLICATE = 0.95
"""Lowest cosine of the gradients of near-duplicates."""
WITHIN = ", within sources"
"""Ends the names of methods that give each source the share of the budget that it has of the pool's tokens."""
FIRST = (
    "random",
    "combination",
    "target, mean cosine",
    *(f"{end} {by}" for by in ("effective_rank", "nuclear_norm", "loss") for end in ("high", "low")),
    f"combination{WITHIN}",
    *(f"{end} {by}{WITHIN}" for by in ("effective_rank", "nuclear_norm", "loss") for end in ("high", "low")),
)
"""Methods that are run first."""


def _by_sketches(policy: str) -> Callable[[Scored, str, int], Selection]:
    options: dict[str, Any] = {"threshold": DUPLICATE} if policy == "deduplicate" else {}

    def chosen(pool: Scored, budget: str, seed: int) -> Selection:
        scores = pool.scored("effective_rank")
        return select(scores, None, budget, policy, index=pool.sketch_index, seed=seed, **options)

    return chosen


def _target_mean(pool: Scored, budget: str, seed: int) -> Selection:
    mean = pool.target_sketches.mean(axis=0)
    lengths = np.linalg.norm(pool.sketches, axis=1)
    cosine = pool.sketches @ mean / np.where(lengths > 0, lengths, 1) / np.linalg.norm(mean)
    return select(pool.valued(cosine.astype(float)), None, budget, "top", seed=seed)


def _target_best(pool: Scored, budget: str, seed: int) -> Selection:
    return select(
        pool.plain, None, budget, "match-target", vectors=pool.sketches, target=pool.target_sketches, seed=seed
    )
