"""`selector search`: who lies near whom, from samples of the index or from a row that is scored on the fly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.cli.foreign import place
from selector.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

    from selector.index import Filter, GradientIndex


@dataclass(frozen=True, kw_only=True)
class SearchCommand(Command):
    """Show the samples whose gradient spectra are most alike, or most opposed, to some samples or to a new row.

    Example: selector search index/ --ids sample-17 --data train.jsonl

    A new row is scored with the model and settings of the indexed store:
    selector search index/ --like '{"prompt": "2 + 2 =", "completion": " 4"}' --store features/
    """

    name: ClassVar[str] = "search"

    index: Annotated[Path, Positional]
    """Directory of the index."""
    ids: tuple[str, ...] = ()
    """Sample ids to start from."""
    like: str | None = None
    """A row as JSON, with the columns of the data set that was scored."""
    store: Path | None = None
    """Directory of the store that was indexed, which says how a row is scored."""
    k: int = 10
    """Neighbors of each."""
    opposing: bool = False
    """Look for the opposite instead."""
    sources: tuple[str, ...] = ()
    """Show only samples of these data sets; of all when empty."""
    data: str | None = None
    """The data set that was scored, to show texts."""
    split: str = "train"
    """Which split of it, where there are several."""

    def run(self) -> int:
        from selector.data.load import load_rows
        from selector.index import Filter, GradientIndex

        if not self.ids and self.like is None:
            raise ConfigError("nothing to search for", allowed="--ids, --like, or both", fix="name a sample with --ids")
        index = GradientIndex.open(self.index)
        rows = load_rows(self.data, self.split) if self.data is not None else None
        where = Filter(sources=self.sources) if self.sources else None
        side = "opposite to" if self.opposing else "near"
        for query, ids, similarities in self._found(index, where):
            console().print(_table(f"{side} {escape(query)}", index, ids, similarities, rows))
        return 0

    def _found(self, index: GradientIndex, where: Filter | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        if self.ids:
            found = index.search_ids(self.ids, self.k, where=where, opposing=self.opposing)
            yield from ((query, *neighbors) for query, neighbors in zip(self.ids, found, strict=True))
        if self.like is not None:
            vector = self._vector(index, self.like)
            (neighbors,) = index.search(vector, self.k, where=where, opposing=self.opposing)
            yield ("the row", *neighbors)

    def _vector(self, index: GradientIndex, like: str) -> np.ndarray:
        """The place of a new row in the index."""
        import datasets

        from selector.store import FeatureStore

        try:
            row = json.loads(like)
        except json.JSONDecodeError as error:
            raise DataError("--like is no JSON", got=error, allowed='{"prompt": "...", "completion": "..."}') from error
        if not isinstance(row, dict):
            raise DataError("--like is no row", got=type(row).__name__, allowed="a JSON object")
        if self.store is None:
            raise ConfigError("a row needs the store that was indexed", fix="name its directory with --store")
        return place(datasets.Dataset.from_list([row]), FeatureStore.open(self.store), index)


def _table(
    title: str, index: GradientIndex, ids: np.ndarray, similarities: np.ndarray, rows: datasets.Dataset | None
) -> Table:
    metadata = index.metadata(ids)
    shown = metadata.drop_columns("row")
    table = Table("similarity", "sample", *shown.column_names, title=title)
    texts = [[preview(rows[row])] for row in metadata["row"].to_pylist()] if rows is not None else [[]] * len(ids)
    if rows is not None:
        table.add_column("text")
    for sample_id, similarity, values, text in zip(ids, similarities, shown.to_pylist(), texts, strict=True):
        cells = [f"{value:.4g}" if isinstance(value, float) else escape(str(value)) for value in values.values()]
        table.add_row(f"{similarity:.4f}", escape(str(sample_id)), *cells, *text)
    return table


def preview(row: object, width: int = 80) -> str:
    """The beginning of a row's longest text, on one line and without markup.

    Args:
        row: a row of the data set.
        width: most characters.
    """
    values = [value for value in (row.values() if isinstance(row, dict) else [row]) if isinstance(value, str | list)]
    text = " ".join(str(max(values, key=lambda value: len(str(value)), default="")).split())
    return escape(text if len(text) <= width else text[: width - 1] + "…")
