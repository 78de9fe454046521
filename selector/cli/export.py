"""`selector export`: a selection as files that training frameworks read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.config import Format, ScoreConfig, save_yaml
from selector.errors import SelectionError
from selector.store.schema import CONFIG

if TYPE_CHECKING:
    import datasets

    from selector.selection import Selection


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Command):
    """Write the picked rows of a data set, best first, for the tool that trains on them.

    Example: selector export selection/selection.parquet --data train.jsonl --to llama-factory --out subset/

    Rows are matched by their ids, never by position: a file that changed since it was scored gives an error, not other rows.
    """

    name: ClassVar[str] = "export"

    selection: Annotated[Path, Positional]
    """File of the selection."""
    data: str
    """The data set that was scored."""
    out: Path
    """Directory of the files."""
    to: Literal["jsonl", "parquet", "datasets", "index", "trl", "llama-factory", "axolotl", "ms-swift", "verl"] = (
        "jsonl"
    )
    """What to write: all columns, positions and ids alone (index), or a framework's rows and settings."""
    split: str = "train"
    """Which split, where there are several."""
    id_column: str | None = None
    """Column with the sample ids, as it was for `selector score`."""
    format: Format = "auto"
    """Layout of the rows, likewise."""
    columns: tuple[str, ...] = ()
    """Which column holds what, likewise."""

    def run(self) -> int:
        from selector.data.load import load_rows
        from selector.export import export
        from selector.selection import Selection

        selection = Selection.load(self.selection)
        dataset = load_rows(self.data, self.split)
        config = ScoreConfig(format=self.format, columns=self.columns, id_column=self.id_column)
        ids = _ids(dataset, config, selection)
        written = export(selection, dataset, self.out, self.to, ids=ids, config=config)
        save_yaml(self.out / CONFIG, self.settings(), f"replay with: selector run {self.out}")
        out = console()
        for path in written:
            out.print(str(path))
        out.print(f"{len(selection):,} samples, {selection.n_tokens.sum():,} tokens")
        return 0


def _ids(dataset: datasets.Dataset, config: ScoreConfig, selection: Selection) -> list[str]:
    """The sample id of each row: the column that was named, else hashes of the content."""
    from selector.data.ids import column_ids, content_hash, content_ids
    from selector.data.layout import recognize

    layout = recognize(dataset.column_names, config)
    if layout.id_column is not None:
        return column_ids(dataset[layout.id_column], layout.id_column)
    ids = content_ids(content_hash(row) for row in layout.rows(dataset))
    if len(selection) and set(ids).isdisjoint(selection.ids.tolist()):
        raise SelectionError(
            "no row of the data set is in the selection", got=f"ids such as {selection.ids[0]!r}", allowed="hashes of the rows' content",
            fix="name the column that holds the ids with --id-column, and use the file that was scored",
        )  # fmt: skip
    return ids
