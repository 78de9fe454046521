"""Policies that match target examples: what the training should make better.

match-target       rank of the similarity to the targets
target-subspace    share of a sample's gradient that lies in the span of the targets' gradients
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from selector.errors import ConfigError
from selector.policies.base import POLICIES, Pool, by_value, require, texts, unit
from selector.policies.budget import Budget
from selector.types import Picks


@POLICIES.register("match-target")
def match_target(pool: Pool, budget: Budget, *, seed: int, over: str = "max") -> Picks:
    """The samples that rank highest in similarity to the target examples.

    Each target ranks the whole pool by cosine. Ranks, unlike cosines, weigh a target in a sparse region as much as one
    in a dense region.

    Source: Language Models Improve When Pretraining Data Matches Target Tasks (BETR).

    Args:
        pool: the samples, with vectors and a target.
        budget: how much may be picked.
        seed: not used.
        over: a sample's rank for its best target (max), which covers every target, or on average (mean). Equal ranks
            go to the better average, then to the smaller id.
    """
    if over not in ("max", "mean"):
        raise ConfigError("over is unknown", got=over, allowed="max, mean")
    ranks = target_ranks(require(pool, "vectors"), require(pool, "target"))
    mean = ranks.mean(axis=1)
    best, nearest = ranks.min(axis=1), ranks.argmin(axis=1)
    order = np.lexsort((mean, best)) if over == "max" else np.argsort(mean, kind="stable")
    picked = budget.prefix(order, pool.n_tokens)
    if over == "max":
        reasons = [f"rank {best[p] + 1} of {len(pool)} for target {nearest[p] + 1}" for p in picked]
    else:
        reasons = [f"mean rank {mean[p] + 1:.1f} of {len(pool)} over {ranks.shape[1]} targets" for p in picked]
    return Picks(picked, texts(reasons))


@POLICIES.register("target-subspace")
def target_subspace(pool: Pool, budget: Budget, *, seed: int, rank: int = 16) -> Picks:
    """The samples whose vectors lie most in the leading subspace of the targets: ||U^T g|| / ||g||.

    Source: Grassmann Class Representation.

    Args:
        pool: the samples, with vectors and a target.
        budget: how much may be picked.
        seed: not used.
        rank: most dimensions of the subspace; fewer when the targets span fewer.
    """
    if rank < 1:
        raise ConfigError("rank is out of range", got=rank, allowed="1 or more")
    share = subspace_share(require(pool, "vectors"), require(pool, "target"), rank)
    picked = budget.prefix(by_value(share), pool.n_tokens)
    return Picks(picked, texts([f"{100 * share[p]:.0f}% within the target's subspace" for p in picked]))


def target_ranks(vectors: Float[np.ndarray, "N D"], target: Float[np.ndarray, "M D"]) -> np.ndarray:
    """Rank, from 0, of every sample in cosine with each target; equal cosines by position.

    Args:
        vectors: the pool.
        target: the target examples.

    Returns:
        [N, M] int64.
    """
    cosines = np.asarray(unit(vectors) @ unit(target).T)
    ranks = np.empty(cosines.shape, dtype=np.int64)
    order = np.argsort(-cosines, axis=0, kind="stable")
    np.put_along_axis(ranks, order, np.arange(len(ranks))[:, None], axis=0)
    return ranks


def subspace_share(
    vectors: Float[np.ndarray, "N D"], target: Float[np.ndarray, "M D"], rank: int
) -> Float[np.ndarray, " N"]:
    """Length of each vector's projection on the leading right singular vectors of the targets, as a share of its own.

    Args:
        vectors: the pool; a zero vector has the share 0.
        target: the target examples, each scaled to length one.
        rank: most dimensions of the subspace.
    """
    _, sigma, right = np.linalg.svd(unit(np.asarray(target, dtype=np.float64)), full_matrices=False)
    basis = right[: min(rank, int((sigma > 1e-6 * sigma[0]).sum()))]
    return np.linalg.norm(unit(np.asarray(vectors, dtype=np.float64)) @ basis.T, axis=1)
