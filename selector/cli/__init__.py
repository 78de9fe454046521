"""The command line: one dataclass per verb, one place where errors become messages and exit codes.

Exit codes: 0 done; 1 `verify` found problems; 2 an error that the message explains; 3 too many samples without a score.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Union

import tyro

from selector.cli.command import Command
from selector.cli.compare import CompareCommand
from selector.cli.demo import DemoCommand
from selector.cli.doctor import DoctorCommand
from selector.cli.export import ExportCommand
from selector.cli.index import IndexCommand
from selector.cli.inspect import InfoCommand, VerifyCommand
from selector.cli.merge import MergeCommand
from selector.cli.plot import PlotCommand
from selector.cli.predict import PredictCommand
from selector.cli.replay import RunCommand
from selector.cli.report import ReportCommand
from selector.cli.score import ScoreCommand
from selector.cli.search import SearchCommand
from selector.cli.select import SelectCommand
from selector.cli.transfer import TransferCommand
from selector.errors import SelectorError

COMMANDS: tuple[type[Command], ...] = (
    DemoCommand, ScoreCommand, InfoCommand, VerifyCommand, MergeCommand, IndexCommand, SearchCommand, PredictCommand,
    SelectCommand, CompareCommand, ExportCommand, ReportCommand, PlotCommand, TransferCommand, RunCommand, DoctorCommand,
)  # fmt: skip

DESCRIPTION = "Choose post-training data by what each sample would do to the model."

OVERVIEW = f"""\
{DESCRIPTION}

  selector demo                                                       two minutes, real rows, no network
  selector score  --model MODEL --data train.jsonl --out features/    measure every sample
  selector select features/ --budget 10% --out selection/             pick, with a random control beside it
  selector report features/ selection/ --out report.html              look before you train
  selector run    features/                                           do it again, or finish it

All commands: selector --help. One of them: selector COMMAND --help. What is installed here: selector doctor.
"""
"""What the program says when it is called without a word: the five commands that are used most."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command.

    Args:
        arguments: words after the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # threads that wait for each other by spinning lose whole time slices where other work shares the cores: up to nine times
    # slower on two cores. Read once, when torch is loaded, which happens in the commands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("selector").setLevel(logging.INFO)
    if not words:
        print(OVERVIEW, end="")
        return 0
    choices = tuple(Annotated[command, tyro.conf.subcommand(command.name)] for command in COMMANDS)
    command = tyro.cli(  # pyright: ignore[reportCallIssue]
        Union[choices],  # noqa: UP007  # pyright: ignore[reportArgumentType]
        prog="selector",
        description=DESCRIPTION,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return command.run()
    except SelectorError as error:
        print(f"error: {error}\n{what_next(command.name, error)}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def what_next(verb: str, error: SelectorError) -> str:
    """The last line of an error: what to type next, where its fix has not said so.

    Args:
        verb: the command that failed.
        error: why it failed.
    """
    if error.fix is not None and ("`" in error.fix or "pip install" in error.fix):
        return ""
    return f"  next:    selector {verb} --help"
