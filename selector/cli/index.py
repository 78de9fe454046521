"""`selector index` and `selector search`: who lies near whom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.config import save_yaml
from selector.store.schema import CONFIG


@dataclass(frozen=True, kw_only=True)
class IndexCommand(Command):
    """Build a FAISS index over the spectral features of a store.

    Example: selector index features/ --out index/
    """

    name: ClassVar[str] = "index"

    store: Annotated[Path, Positional]
    """Directory of the feature store."""
    out: Path
    """Directory of the index."""
    metric: Literal["cosine", "l2"] = "cosine"
    """How samples are compared."""
    kind: Literal["auto", "flat", "ivf", "ivf-sq8", "ivf-pq"] = "auto"
    """Exact, inverted lists, or compressed ones; auto chooses by size and says so."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """FAISS, or torch matrix products where FAISS does not reach the device."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where searches run."""
    seed: int = 0
    """Of every random choice."""

    def run(self) -> int:
        from selector.index import GradientIndex
        from selector.scores import score
        from selector.store import FeatureStore

        store = FeatureStore.open(self.store)
        index = GradientIndex.build(
            store,
            scores=score(store),
            metric=self.metric,
            kind=self.kind,
            backend=self.backend,
            device=self.device,
            seed=self.seed,
        )
        index.save(self.out)
        save_yaml(self.out / CONFIG, self.settings(), f"replay with: selector run {self.out}")
        console().print(f"{self.out}: {index.description}")
        return 0


@dataclass(frozen=True, kw_only=True)
class SearchCommand(Command):
    """Show the samples whose gradient spectra are most alike, or most opposed, to some samples.

    Example: selector search index/ --ids sample-17 --data train.jsonl
    """

    name: ClassVar[str] = "search"

    index: Annotated[Path, Positional]
    """Directory of the index."""
    ids: tuple[str, ...]
    """Sample ids to start from."""
    k: int = 10
    """Neighbors per sample."""
    opposing: bool = False
    """Look for the opposite of each sample instead."""
    sources: tuple[str, ...] = ()
    """Show only samples of these data sets; of all when empty."""
    data: str | None = None
    """The data set that was scored, to show texts."""
    split: str = "train"
    """Which split of it, where there are several."""

    def run(self) -> int:
        from selector.data.load import load_rows
        from selector.index import Filter, GradientIndex

        index = GradientIndex.open(self.index)
        where = Filter(sources=self.sources) if self.sources else None
        found = index.search_ids(self.ids, self.k, where=where, opposing=self.opposing)
        rows = load_rows(self.data, self.split) if self.data is not None else None
        out = console()
        for query, (ids, similarities) in zip(self.ids, found, strict=True):
            metadata = index.metadata(ids)
            texts = [preview(rows[row]) for row in metadata["row"].to_pylist()] if rows is not None else None
            shown = metadata.drop_columns("row")
            table = Table(
                "similarity",
                "sample",
                *shown.column_names,
                title=f"{'opposite to' if self.opposing else 'near'} {query}",
            )
            if texts is not None:
                table.add_column("text")
            for i, (sample_id, similarity) in enumerate(zip(ids, similarities, strict=True)):
                cells = [
                    f"{value:.4g}" if isinstance(value, float) else str(value)
                    for value in shown.slice(i, 1).to_pylist()[0].values()
                ]
                table.add_row(f"{similarity:.4f}", sample_id, *cells, *(texts[i : i + 1] if texts is not None else []))
            out.print(table)
        return 0


def preview(row: object, width: int = 80) -> str:
    """The beginning of a row's longest text, on one line and without markup.

    Args:
        row: a row of the data set.
        width: most characters.
    """
    from rich.markup import escape

    values = [value for value in (row.values() if isinstance(row, dict) else [row]) if isinstance(value, str | list)]
    text = " ".join(str(max(values, key=lambda value: len(str(value)), default="")).split())
    return escape(text if len(text) <= width else text[: width - 1] + "…")
