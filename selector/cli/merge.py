"""`selector merge`: join the stores of nodes without a shared file system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional

from selector.cli.command import Command, console


@dataclass(frozen=True, kw_only=True)
class MergeCommand(Command):
    """Join feature stores of one run, each sample once.

    Example: selector merge node0/features node1/features --out features/

    Afterwards the command that began the stores finishes what is missing, in the joined one.
    """

    name: ClassVar[str] = "merge"

    stores: Annotated[tuple[Path, ...], Positional]
    """Directories of the stores."""
    out: Path
    """Directory of the joined store."""

    def run(self) -> int:
        from selector.store.merge import merge

        store = merge(self.stores, self.out)
        missing = store.manifest.expected - len(store)
        console().print(
            f"{store.path}: {len(store):,} samples"
            + (f", {missing:,} are missing" if missing else ", all that the data set has")
        )
        return 0
