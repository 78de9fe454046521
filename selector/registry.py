"""Tables of named parts that strangers may extend: each refuses duplicates and suggests the name that was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from selector.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to parts of one kind.

    Args:
        kind: what the parts are, for messages: `"policy"`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Enter the decorated part under a name.

        Args:
            name: lower-case words joined by hyphens or underscores.

        Raises:
            ConfigError: the name is taken.
        """

        def enter(part: T) -> T:
            if name in self._parts:
                raise ConfigError(f"the {self.kind} {name!r} is registered already", fix="choose another name")
            self._parts[name] = part
            return part

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise ConfigError(
                f"unknown {self.kind}", got=repr(name), allowed=", ".join(sorted(self._parts)),
                fix=did_you_mean(name, self._parts) or None,
            )  # fmt: skip
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))
