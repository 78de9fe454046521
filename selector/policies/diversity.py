"""Policies that spread over the space of gradients.

    coding-rate    largest volume: the log-determinant of the picked samples' second moment
    mmr            a good score, less the similarity to what is picked already

Both are greedy and cost N x D for each pick.
"""

from __future__ import annotations

import numpy as np

from selector.errors import ConfigError
from selector.policies.base import POLICIES, Pool, by_value, require, texts, unit
from selector.policies.budget import Budget
from selector.types import Picks

DIGITS = 9
"""Decimals to which gains are compared, so that rounding does not decide between samples that tie."""


@POLICIES.register("coding-rate")
def coding_rate(pool: Pool, budget: Budget, *, seed: int, epsilon: int | float = 0.5) -> Picks:
    """The samples whose directions need the most bits to code.

    Maximizes log det(I + Z^T Z / epsilon^2) over the picked samples' unit vectors Z. The gain of a sample with unit
    vector z is log(1 + z^T M^-1 z / epsilon^2); all quadratic forms are kept up to date by rank-one updates. Equal
    gains go to the higher score.

    Source: Yu et al. 2020, Maximal Coding Rate Reduction (arXiv 2006.08558), equation 7, with a fixed precision
    per sample.

    Args:
        pool: the samples, with vectors.
        budget: how much may be picked.
        seed: not used.
        epsilon: precision of the code; smaller prefers new directions longer.
    """
    if not epsilon > 0:
        raise ConfigError("epsilon is out of range", got=epsilon, allowed="> 0")
    best_first = by_value(pool.values)
    z = unit(np.asarray(require(pool, "vectors"), dtype=np.float64))[best_first] / epsilon
    quadratic = np.einsum("nd,nd->n", z, z)
    inverse = np.eye(z.shape[1])
    meter, picked, gains = budget.meter(pool.n_tokens), [], []
    free = np.ones(len(pool), dtype=bool)
    while len(picked) < len(pool) and meter.open:
        position = int(np.argmax(np.where(free, np.round(quadratic, DIGITS), -1.0)))
        if not meter.take(int(best_first[position])):
            break
        free[position] = False
        picked.append(best_first[position])
        gains.append(np.log1p(quadratic[position]))
        direction = inverse @ z[position]
        scale = 1 + quadratic[position]
        inverse -= np.outer(direction, direction) / scale
        quadratic = np.maximum(quadratic - np.square(z @ direction) / scale, 0.0)
    return Picks(np.array(picked, dtype=np.int64), texts([f"adds {gain:.3g} nats of volume" for gain in gains]))


@POLICIES.register("mmr")
def mmr(pool: Pool, budget: Budget, *, seed: int, trade: int | float = 0.5) -> Picks:
    """Maximal marginal relevance: trade x rank of the score - (1 - trade) x largest cosine with a picked sample.

    Source: Carbonell and Goldstein 1998, The use of MMR.

    Args:
        pool: the samples, with vectors.
        budget: how much may be picked.
        seed: not used.
        trade: 1 looks at the score alone, 0 at novelty alone.
    """
    if not 0 <= trade <= 1:
        raise ConfigError("trade is out of range", got=trade, allowed="0 to 1")
    z = unit(np.asarray(require(pool, "vectors"), dtype=np.float64))
    relevance = np.empty(len(pool))
    relevance[by_value(pool.values)] = 1 - np.arange(len(pool)) / max(len(pool) - 1, 1)
    likeness = np.zeros(len(pool))
    meter, picked, reasons = budget.meter(pool.n_tokens), [], []
    free = np.ones(len(pool), dtype=bool)
    while len(picked) < len(pool) and meter.open:
        position = int(np.argmax(np.where(free, trade * relevance - (1 - trade) * likeness, -np.inf)))
        if not meter.take(position):
            break
        free[position] = False
        reasons.append(f"score rank {relevance[position]:.2f}, cosine {likeness[position]:.2f} with earlier picks")
        cosine = z @ z[position]
        likeness = np.maximum(likeness, cosine) if picked else cosine
        picked.append(position)
    return Picks(np.array(picked, dtype=np.int64), texts(reasons))
