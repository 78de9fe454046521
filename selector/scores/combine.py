"""Several scores of one pool made into one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from selector.errors import ConfigError, SelectionError, did_you_mean
from selector.scores.statistics import mean_ranks
from selector.types import Scores


def combine(
    scores: Mapping[str, Scores], weights: Mapping[str, int | float] | None = None, *, how: str = "rank"
) -> Scores:
    """Weighted mean of scores after each was brought to one scale.

    Ranks bear outliers and skew; z-scores keep how far apart samples lie. Directions are those of the scores: higher
    is better in each. A sample that lacks one of the scores has none.

    Args:
        scores: scores by name, of the same samples in the same order.
        weights: weight by name, 1 where none is given; a negative weight reverses a score.
        how: `"rank"` (0 to 1, ties sharing their mean rank) or `"z"`.

    Raises:
        ConfigError: an unknown name or scale, or no weight that counts.
        SelectionError: the scores are of different samples.
    """
    given = dict(weights or {})
    if how not in ("rank", "z"):
        raise ConfigError("scores cannot be combined so", got=how, allowed="rank, z")
    for name in given:
        if name not in scores:
            fix = did_you_mean(name, scores) or None
            raise ConfigError("a weight names no score", got=name, allowed=", ".join(scores), fix=fix)
    shares = {name: float(given.get(name, 1.0)) for name in scores}
    total = sum(map(abs, shares.values()))
    if not (np.isfinite(total) and total > 0):
        raise ConfigError("no weight counts", got=shares, allowed="finite, one of them not zero")
    first = next(iter(scores.values()))
    for name, other in scores.items():
        if not np.array_equal(other.ids, first.ids):
            raise SelectionError(f"the score {name!r} is of other samples", allowed="the same ids in the same order")
    scored = np.all([np.isfinite(one.values) for one in scores.values()], axis=0)
    values = np.full(len(first), np.nan)
    values[scored] = sum(share / total * _scaled(scores[name].values[scored], how) for name, share in shares.items())
    return Scores(
        ids=first.ids,
        rows=first.rows,
        values=values,
        raw=values,
        n_tokens=first.n_tokens,
        n_loss_tokens=first.n_loss_tokens,
        source=first.source,
        provenance={
            "combined": how,
            "weights": shares,
            "scores": {name: one.provenance for name, one in scores.items()},
        },
    )


def _scaled(values: Float[np.ndarray, " N"], how: str) -> Float[np.ndarray, " N"]:
    if how == "rank":
        return (mean_ranks(values) - 0.5) / max(len(values), 1)
    deviation = values.std() if len(values) else 0.0
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros(len(values))
