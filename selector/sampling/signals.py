"""Signals that turn the rewards of reinforcement learning into sampling weights.

A group of completions whose rewards are all equal has no advantage and gives no gradient, so a prompt is worth its cost
where success is neither certain nor impossible. The pass rate p of each prompt is estimated from its own rewards, with
older ones forgotten as the policy moves; p (1 - p) is the variance that the next group is expected to have. Prompts that
were never tried count as p = 1/2 and are tried early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, Shaped

from selector.errors import ConfigError
from selector.sampling.curricula import gaussian, ranks_of
from selector.sampling.spectral import TapSignal
from selector.store.schema import fingerprint

Learnability = Literal["pass_rate", "variance"]


class RewardSignal:
    """Weights by learnability, spectral richness and angle concentration.

        weight = learnability * rank(score) ^ richness * rank(angle) ^ concentration

    Args:
        learnability: `pass_rate` takes p (1 - p); `variance` takes the variance of a prompt's rewards, for rewards that know
            more than passed and failed. A prompt that was never tried counts as the most learnable.
        success: a completion whose reward is above this has passed.
        richness: exponent of the rank of the selection's score; 0 ignores it.
        spectra: weights by spectra of the policy gradients that training computes, which take the place of
            rank(score) ^ richness; None goes by the selection's scores.
        angles: angle concentration of each sample by its id; None leaves it out.
        concentration: exponent of the rank of the angle concentration.
        forget: factor on a prompt's earlier results when new ones arrive, 0 <= forget <= 1.
        hopeless_after: results without one success after which a prompt counts as unsolved.
        on_unsolved: called, on every rank, with the ids of prompts that have just become unsolved, for whoever serves
            them demonstrations instead; they are then drawn for coverage alone.

    Source:
        p (1 - p): Foster and Foerster, Learning to reason at the frontier of learnability, 2025.
    """

    def __init__(
        self,
        *,
        learnability: Learnability = "pass_rate",
        success: float = 0.5,
        richness: float = 0.5,
        spectra: TapSignal | None = None,
        angles: Mapping[str, float] | None = None,
        concentration: float = 0.5,
        forget: float = 0.9,
        hopeless_after: int = 16,
        on_unsolved: Callable[[list[str]], None] | None = None,
    ) -> None:
        if not 0 <= forget <= 1:
            raise ConfigError("forget is a factor on earlier results", got=forget, allowed="0 <= forget <= 1")
        if learnability not in get_args(Learnability):
            raise ConfigError("unknown learnability", got=learnability, allowed=", ".join(get_args(Learnability)))
        self.learnability, self.spectra, self.on_unsolved = learnability, spectra, on_unsolved
        self.success, self.forget, self.hopeless_after = success, forget, hopeless_after
        self.richness, self.angles, self.concentration = richness, angles, concentration

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        n = len(ids)
        self._ids, self._prior = ids, np.ones(n)
        if self.spectra is not None:
            self.spectra.bind(ids, scores)
        elif self.richness:
            self._prior *= ranks_of(_complete(scores, "scores")) ** self.richness
        if self.angles is not None:
            self._prior *= ranks_of(_angles_of(ids, self.angles)) ** self.concentration
        self._passed, self._tried = np.zeros(n), np.zeros(n)
        self._sum, self._squares = np.zeros(n), np.zeros(n)
        self._results = np.zeros(n, dtype=np.int64)
        self._solved = np.zeros(n, dtype=bool)
        self._groups = np.zeros(2, dtype=np.int64)

    def observe(self, positions: Int[np.ndarray, " M"], rewards: Float[np.ndarray, " M"]) -> None:
        """Take the rewards of completions.

        Args:
            positions: [M] the prompt of each completion, as position in the sampler's `ids`.
            rewards: [M] reward of each completion; NaN where it has none.
        """
        known = ~np.isnan(rewards)
        positions, rewards = positions[known], rewards[known]
        prompts, member = np.unique(positions, return_inverse=True)
        before = set(self.unsolved().tolist()) if self.on_unsolved else set()
        news = {
            "_tried": np.ones(len(rewards)),
            "_passed": rewards > self.success,
            "_sum": rewards,
            "_squares": rewards**2,
        }
        sums = {name: np.bincount(member, weights=new, minlength=len(prompts)) for name, new in news.items()}
        for name, new in sums.items():
            getattr(self, name)[prompts] = self.forget * getattr(self, name)[prompts] + new
        self._results[prompts] += sums["_tried"].astype(np.int64)
        self._solved[prompts] |= sums["_passed"] > 0
        smallest, largest = np.full(len(prompts), np.inf), np.full(len(prompts), -np.inf)
        np.minimum.at(smallest, member, rewards)
        np.maximum.at(largest, member, rewards)
        self._groups += (len(prompts), int((smallest == largest).sum()))
        if self.on_unsolved and (new := sorted(set(self.unsolved().tolist()) - before)):
            self.on_unsolved([str(self._ids[i]) for i in new])

    def pass_rates(self) -> Float[np.ndarray, " K"]:
        """[K] expected share of completions that pass, from a uniform prior: 1/2 where nothing is known."""
        return (self._passed + 1) / (self._tried + 2)

    def reward_variances(self) -> Float[np.ndarray, " K"]:
        """[K] variance of each prompt's rewards, older ones forgotten; NaN where nothing is known."""
        tried = np.where(self._tried > 0, self._tried, np.nan)
        return np.maximum(self._squares / tried - (self._sum / tried) ** 2, 0.0)

    def unsolved(self) -> Int[np.ndarray, " M"]:
        """[M] positions of prompts that were tried often enough without one success: better served by demonstrations.

        Source:
            Lv et al., Towards a unified view of large language model post-training (HPT), 2025.
        """
        return np.flatnonzero(~self._solved & (self._results >= self.hopeless_after))

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] weights for the next draw."""
        weights = self._learnable() * (self._prior if self.spectra is None else self._prior * self.spectra.weights())
        if self.on_unsolved:
            weights[self.unsolved()] = 0.0
        return weights

    def _learnable(self) -> Float[np.ndarray, " K"]:
        if self.learnability == "pass_rate":
            p = self.pass_rates()
            return p * (1 - p)
        # two more results of the largest variance that is known, as pass rates have two of a fair coin
        variances = np.nan_to_num(self.reward_variances())
        largest = variances.max(initial=0.0) or 1.0
        return (self._tried * variances + 2 * largest) / (self._tried + 2)

    def metrics(self) -> dict[str, float]:
        """Figures for the training log."""
        groups, uniform = self._groups.tolist()
        tried = self._results > 0
        return {
            "pass_rate": float(self.pass_rates()[tried].mean()) if tried.any() else float("nan"),
            "uniform_groups": uniform / groups if groups else float("nan"),
            "unsolved_prompts": float(len(self.unsolved())),
            "reward_variance": float(self.reward_variances()[tried].mean()) if tried.any() else float("nan"),
            **(self.spectra.metrics() if self.spectra else {}),
        }

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        own = {
            "learnability": self.learnability, "routes": self.on_unsolved is not None, "success": self.success, "richness": self.richness, "angles": _digest(self.angles),
            "concentration": self.concentration, "forget": self.forget, "hopeless_after": self.hopeless_after,
        }  # fmt: skip
        return own | {
            f"spectra.{name}": value for name, value in (self.spectra.identity() if self.spectra else {}).items()
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        own = {
            "passed": self._passed, "tried": self._tried, "results": self._results, "solved": self._solved,
            "groups": self._groups, "sum": self._sum, "squares": self._squares,
        }  # fmt: skip
        return own | {
            f"spectra.{name}": array for name, array in (self.spectra.state_dict() if self.spectra else {}).items()
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        self._passed, self._tried = state["passed"].copy(), state["tried"].copy()
        self._results, self._solved = state["results"].copy(), state["solved"].copy()
        self._groups = state["groups"].copy()
        self._sum, self._squares = state["sum"].copy(), state["squares"].copy()
        if self.spectra is not None:
            inner = {name: array for name, array in state.items() if name.startswith("spectra.")}
            self.spectra.load_state_dict({name.removeprefix("spectra."): array for name, array in inner.items()})


class FocusSignal:
    """A Gaussian over ranks whose center moves on while the model succeeds, and back while it fails.

    Ranks go from the highest angle concentration, which a model learns fastest, to the lowest; without angles, from the
    lowest score to the highest. After every batch of rewards the center moves by

        step * (tanh(2 (accuracy - target)) + tanh(mean angle of the batch, standardized over all samples))

    and stays within [0, 1].

    Args:
        angles: angle concentration of each sample by its id; None ranks by score and leaves the second term out.
        center: rank to begin at.
        step: largest move per term, in ranks.
        target: accuracy at which the center rests.
        success: a completion whose reward is above this has passed.

    Source:
        Wang et al., Angles don't lie: unlocking training-efficient RL through the model's own signals, 2025; here the
        center is bounded, and angles are those of the scored model.
    """

    def __init__(
        self,
        angles: Mapping[str, float] | None = None,
        *,
        center: float = 0.0,
        step: float = 0.02,
        target: float = 0.5,
        success: float = 0.5,
    ) -> None:
        self.angles, self.first_center, self.step, self.target, self.success = angles, center, step, target, success

    def bind(self, ids: Shaped[np.ndarray, " K"], scores: Float[np.ndarray, " K"]) -> None:
        """Begin, once, with the samples that can be drawn and their scores."""
        self.center = self.first_center
        if self.angles is None:
            self._ranks, self._standardized = ranks_of(_complete(scores, "scores")), np.zeros(len(ids))
            return
        angles = _angles_of(ids, self.angles)
        self._ranks = ranks_of(-angles)
        self._standardized = (angles - angles.mean()) / max(angles.std(), 1e-12)

    def observe(self, positions: Int[np.ndarray, " M"], rewards: Float[np.ndarray, " M"]) -> None:
        """Take the rewards of completions and move the center; arguments as for `RewardSignal.observe`."""
        known = ~np.isnan(rewards)
        if not known.any():
            return
        accuracy = (rewards[known] > self.success).mean()
        move = np.tanh(2 * (accuracy - self.target)) + np.tanh(self._standardized[positions].mean())
        self.center = float(np.clip(self.center + self.step * move, 0.0, 1.0))

    def weights(self) -> Float[np.ndarray, " K"]:
        """[K] weights for the next draw."""
        return gaussian(self._ranks, self.center)

    def metrics(self) -> dict[str, float]:
        """Figures for the training log."""
        return {"center": self.center}

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share."""
        return {
            "angles": _digest(self.angles), "center": self.first_center, "step": self.step, "target": self.target,
            "success": self.success,
        }  # fmt: skip

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return {"center": np.array(self.center)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned."""
        self.center = float(state["center"])


def _complete(values: Float[np.ndarray, " K"], what: str) -> Float[np.ndarray, " K"]:
    if np.isnan(values).any():
        raise ConfigError(f"weights need the {what} of every sample", got=f"{np.isnan(values).sum()} without")
    return values


def _angles_of(ids: Shaped[np.ndarray, " K"], angles: Mapping[str, float]) -> Float[np.ndarray, " K"]:
    return _complete(np.array([angles.get(sample_id, np.nan) for sample_id in ids], dtype=float), "angle concentration")


def _digest(angles: Mapping[str, float] | None) -> str | None:
    return None if angles is None else fingerprint(sorted((name, float(value)) for name, value in angles.items()))
