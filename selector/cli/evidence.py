"""What `selector report` and `selector plot` look at, gathered from the files that other commands left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from selector.cli.command import Command
from selector.cli.select import CONTROL, SCORES, SELECTION
from selector.errors import SelectionError

if TYPE_CHECKING:
    import datasets

    from selector.report import Evidence
    from selector.selection import Selection
    from selector.store import FeatureStore
    from selector.types import Scores


@dataclass(frozen=True, kw_only=True)
class EvidenceCommand(Command):
    """Base of the commands that show a store and its selections."""

    store: Annotated[Path, Positional]
    """Directory of the feature store."""
    selections: Annotated[tuple[Path, ...], Positional] = ()
    """Directories that `selector select` wrote, or selection files; the first one is looked at most closely."""
    by: str | None = None
    """Score to show; the one that the first selection was made by, else effective_rank where the store holds spectra."""
    data: str | None = None
    """The data set that was scored, to show texts; the file that the store names, where it is still there."""
    split: str = "train"
    """Which split of it, where there are several."""
    index: Path | None = None
    """Directory of an index of the store, to show near-duplicates and opposites."""

    def evidence(self) -> Evidence:
        """Everything that the options name, opened.

        Raises:
            SelectorError: a file is missing, damaged, or belongs to another store.
        """
        from selector.index import GradientIndex
        from selector.report import Evidence
        from selector.store import FeatureStore

        store = FeatureStore.open(self.store)
        selections = _named(self.selections, SELECTION)
        scores = self._scores(store, next(iter(selections.values()), None))
        return Evidence(
            store=store, scores=scores, selections=selections, controls=self._controls(selections, next(iter(scores.values()))),
            dataset=self._rows(store), index=GradientIndex.open(self.index) if self.index is not None else None,
        )  # fmt: skip

    def _scores(self, store: FeatureStore, selection: Selection | None) -> dict[str, Scores]:
        """The score that was selected by, with its own aggregation and control, and the others with the usual ones."""
        from selector.scores import available, read_scores, score
        from selector.types import MEASURES

        names = [*(MEASURES if store.layers else ()), *store.manifest.scores, "loss"]
        if self.by is not None:
            first = {self.by: score(store, self.by)}
        elif selection is not None and (self.selections[0] / SCORES).is_file():
            found = read_scores(self.selections[0] / SCORES)
            first = {str(found.provenance.get("by", "score")): found}
        else:
            recorded = selection.provenance.get("scores", {}).get("by") if selection is not None else None
            name = recorded if recorded in available(store) else names[0]
            first = {name: score(store, name)}
        return first | {name: score(store, name) for name in names if name not in first}

    def _controls(self, selections: dict[str, Selection], scores: Scores) -> dict[str, Selection]:
        """The control beside each selection, or one drawn now."""
        from selector.selecting import matched_random
        from selector.selection import Selection

        found = {}
        for path, (name, selection) in zip(self.selections, selections.items(), strict=True):
            beside = path / CONTROL
            found[name] = Selection.load(beside) if beside.is_file() else matched_random(selection, scores)
        return found

    def _rows(self, store: FeatureStore) -> datasets.Dataset | None:
        from selector.data.load import load_rows

        recorded = store.manifest.command.get("data")
        if self.data is not None:
            return load_rows(self.data, self.split)
        return load_rows(recorded, self.split) if isinstance(recorded, str) and Path(recorded).exists() else None


def _named(paths: tuple[Path, ...], file: str) -> dict[str, Selection]:
    """Selections by the names of their directories or files, which must differ."""
    from selector.selection import Selection

    found: dict[str, Selection] = {}
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in found:
            raise SelectionError(
                "two selections have one name", got=name, allowed="directories of different names", fix="rename one"
            )
        found[name] = Selection.load(path / file if path.is_dir() else path)
    return found
