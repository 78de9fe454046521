"""`selector run`: do again what a settings file records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional

from selector.cli.command import COMMAND_LINE_ONLY, Command
from selector.config import from_mapping, load_yaml
from selector.errors import ConfigError
from selector.store.schema import CONFIG


@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """Replay a run from its directory or from a YAML file of settings.

    Example: selector run features/

    A directory is continued in place. A file's `out` must lie below the current directory; `--out` may be anywhere.
    """

    name: ClassVar[str] = "run"

    settings_from: Annotated[Path, Positional]
    """Directory that a run wrote, or a YAML file with `command` and its options."""
    out: Path | None = None
    """Write here instead."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint; a settings file cannot ask for it."""

    def run(self) -> int:
        return self.resolve().run()

    def resolve(self) -> Command:
        """The command that the settings describe.

        Raises:
            ConfigError: the settings cannot be read, ask for foreign code, or would write elsewhere.
        """
        from selector.cli import COMMANDS

        is_directory = self.settings_from.is_dir()
        path = self.settings_from / CONFIG if is_directory else self.settings_from
        values = load_yaml(path)
        asked = [option for option in COMMAND_LINE_ONLY if option in values]
        if asked:
            raise ConfigError(
                f"{path} asks to run foreign code", got=", ".join(asked), allowed="these options on the command line only",
                fix="remove them from the file; if you trust the checkpoint, add --trust-remote-code to `selector run`",
            )  # fmt: skip
        commands = {command.name: command for command in COMMANDS if command.name != self.name}
        name = values.pop("command", None)
        if name not in commands:
            raise ConfigError(f"{path} names no command", got=name, allowed=", ".join(commands))
        command = commands[name]
        fields = {field.name for field in dataclasses.fields(command)}
        if "out" in fields:
            out = str(values.pop("out", "") or (self.settings_from if is_directory else ""))
            if self.out is not None:
                out = str(self.out)
            elif not is_directory and (not out or Path(out).is_absolute() or ".." in Path(out).parts):
                raise ConfigError(
                    f"{path}: out must lie below the current directory", got=out or "nothing", allowed="a relative path without ..",
                    fix="say where with --out",
                )  # fmt: skip
            values["out"] = out
        if self.trust_remote_code and "trust_remote_code" in fields:
            values["trust_remote_code"] = True
        return from_mapping(command, values, str(path))
