"""Every error that a user can cause, in one small tree.

A message has up to four parts: what is wrong, what was got, what is allowed, and how to fix it. Checks that run before
expensive work gather all their problems and raise them together (`raise_all`), so that nobody fixes one to meet the next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SelectorError(ValueError):
    """Base of all errors that a user can cause.

    Args:
        problem: one sentence that says what is wrong.
        got: what was found.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    def __init__(self, problem: str, *, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.problem, self.got, self.allowed, self.fix = problem, got, allowed, fix
        parts = (("got", got), ("allowed", allowed), ("fix", fix))
        super().__init__(
            "\n".join([problem, *(f"  {name + ':':<9}{value}" for name, value in parts if value is not None)])
        )


class ConfigError(SelectorError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(SelectorError):
    """The data set, or one of its rows, cannot be used."""


class ModelError(SelectorError):
    """The model or its tokenizer cannot be loaded, or has no layers that can be scored."""


class StoreError(SelectorError):
    """A feature store is missing, damaged, or belongs to another run."""


class GradientIndexError(SelectorError):
    """An index is missing, damaged, or does not fit the request."""


class SelectionError(SelectorError):
    """A selection cannot be made from these scores, or does not fit this data."""


class IntegrationError(SelectorError):
    """A host framework is set up in a way that would lose sample identity or give wrong numbers."""


class NumericalError(SelectorError):
    """A computation gave a value that is not a number, or missed its stated tolerance."""


def raise_all(problems: Sequence[SelectorError]) -> None:
    """Raise all problems as one error; do nothing when there are none.

    Args:
        problems: what the checks found, in the order to show.

    Raises:
        SelectorError: the problem itself when there is one, else a numbered list; of the problems' own class when they share it.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    kinds = {type(problem) for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else SelectorError
    raise kind(f"{len(problems)} problems:\n" + "\n".join(f"{i}. {p}" for i, p in enumerate(problems, 1)))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        `"did you mean 'x'?"`, or the empty string when nothing is close.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""
