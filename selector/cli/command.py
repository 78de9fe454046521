"""What every command is: a frozen dataclass whose fields are its options, which runs and can be replayed."""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

COMMAND_LINE_ONLY = ("trust_remote_code", "allow_pickle")
"""Options that let foreign code run: never recorded, and refused in a settings file."""


def console() -> Console:
    """Where commands print their results; as wide as the terminal, or wide enough for a table in a log."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """Base of the commands."""

    name: ClassVar[str]
    """The verb."""

    @abstractmethod
    def run(self) -> int:
        """Do it.

        Returns:
            The exit code.
        """

    def settings(self) -> dict[str, Any]:
        """What `config.yaml` records; the output directory is where the file lies, and is left out."""
        values = _plain(dataclasses.asdict(self))
        return {"command": self.name} | {k: v for k, v in values.items() if k not in (*COMMAND_LINE_ONLY, "out")}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
