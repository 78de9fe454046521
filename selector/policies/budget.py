"""How much may be picked: a number of samples, a number of tokens, or a share of either.

A policy puts samples in an order, and the budget takes the longest beginning of that order that fits: it stops at the
first sample that would exceed it. A token budget is therefore never exceeded and misses by less than one sample.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from selector.errors import ConfigError

_SUFFIX = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmb]?|%)\s*(tokens?|t|samples?)?", re.IGNORECASE)
_ALLOWED = '500 · "10%" · 0.1 · "200k tokens" · "10% tokens"'


@dataclass(frozen=True)
class Budget:
    """An amount of samples or tokens, absolute or as a share of the pool."""

    amount: int | float
    unit: Literal["samples", "tokens"] = "samples"
    relative: bool = False

    @classmethod
    def parse(cls, value: Budget | int | float | str) -> Budget:
        """Read a budget as people write it.

        Args:
            value: an integer (samples), a float up to 1 (share of the samples), or text such as `"500"`, `"10%"`,
                `"200k tokens"`, `"200000t"` or `"10% tokens"` (share of the pool's tokens). `1.0` and `"100%"` are
                the whole pool; `1` and `"1"` are one sample.

        Raises:
            ConfigError: it is none of these.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0:
            return cls(int(value))
        if isinstance(value, float) and 0 <= value <= 1:
            return cls(value, relative=True)
        if isinstance(value, str):
            match = _PATTERN.fullmatch(value.strip())
            if match is not None:
                return cls._from_text(value, *match.groups())
        raise ConfigError("budget cannot be read", got=repr(value), allowed=_ALLOWED)

    @classmethod
    def _from_text(cls, text: str, number: str, suffix: str, unit: str | None) -> Budget:
        kind: Literal["samples", "tokens"] = "tokens" if (unit or "").lower().startswith("t") else "samples"
        amount = float(number)
        if suffix == "%":
            if amount > 100:
                raise ConfigError("budget is more than the whole pool", got=text, allowed="0% to 100%")
            return cls(amount / 100, kind, relative=True)
        if not suffix and not unit and "." in number and amount <= 1:
            return cls(amount, relative=True)
        amount *= _SUFFIX[suffix.lower()]
        if amount != int(amount):
            raise ConfigError("budget is no whole number", got=text, allowed=_ALLOWED)
        return cls(int(amount), kind)

    def resolve(self, n_tokens: Int[np.ndarray, " N"]) -> Budget:
        """The same budget as an absolute amount for one pool, rounded to the nearest sample or down to a token.

        Args:
            n_tokens: tokens of each sample of the pool.
        """
        if not self.relative:
            return self
        if self.unit == "tokens":
            return Budget(int(self.amount * int(np.sum(n_tokens, dtype=np.int64))), "tokens")
        return Budget(int(np.floor(self.amount * len(n_tokens) + 0.5)))

    def prefix(self, order: Int[np.ndarray, " M"], n_tokens: Int[np.ndarray, " N"]) -> Int[np.ndarray, " K"]:
        """The longest beginning of an order that fits.

        Args:
            order: positions, best first.
            n_tokens: tokens of each sample of the pool.
        """
        limit = int(self.resolve(n_tokens).amount)
        if self.unit == "samples":
            return order[:limit]
        return order[: int(np.searchsorted(np.cumsum(n_tokens[order], dtype=np.int64), limit, side="right"))]

    def meter(self, n_tokens: Int[np.ndarray, " N"]) -> Meter:
        """A meter for policies that pick one sample after another.

        Args:
            n_tokens: tokens of each sample of the pool.
        """
        return Meter(self.resolve(n_tokens), n_tokens)

    def __str__(self) -> str:
        if not self.relative:
            return f"{int(self.amount)} {self.unit}"
        return f"{self.amount * 100:g}% of the {self.unit}"


class Meter:
    """What is left of a budget; it closes at the first sample that does not fit.

    Args:
        budget: an absolute budget.
        n_tokens: tokens of each sample of the pool.
    """

    def __init__(self, budget: Budget, n_tokens: Int[np.ndarray, " N"]) -> None:
        self._n_tokens = n_tokens if budget.unit == "tokens" else None
        self._left = int(budget.amount)

    @property
    def open(self) -> bool:
        """Whether anything can still be picked."""
        return self._left > 0

    def take(self, position: int) -> bool:
        """Pay for one sample.

        Args:
            position: the sample.

        Returns:
            Whether it fits; after the first that does not, nothing fits.
        """
        cost = 1 if self._n_tokens is None else int(self._n_tokens[position])
        if cost > self._left:
            self._left = 0
            return False
        self._left -= cost
        return True
