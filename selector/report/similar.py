"""Samples whose spectra are nearly the same, and samples whose spectra are opposite."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from selector.errors import GradientIndexError
from selector.index import GradientIndex
from selector.report.samples import Texts
from selector.selecting.run import find
from selector.store import FeatureStore
from selector.types import Scores

CLUSTERS = 12
"""Largest clusters that are shown."""
MEMBERS = 6
"""Members of a cluster that are shown."""
QUERIES = 1000
"""Samples whose opposite is looked for; evenly spread over the index."""
PAIRS = 12
"""Most opposed pairs that are shown."""
PREVIEW = 160
"""Characters of a text."""

CLUSTER_SCHEMA = pa.schema(
    [("cluster", pa.int64()), ("size", pa.int64()), ("sample_id", pa.string()), ("text", pa.string())]
)
PAIR_SCHEMA = pa.schema(
    [
        ("similarity", pa.float64()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("first_text", pa.string()),
        ("second_text", pa.string()),
    ]
)


def check_index(index: GradientIndex, store: FeatureStore) -> None:
    """Refuse an index of another store, whose neighbours would be those of other samples.

    Args:
        index: an open index.
        store: the store that is reported on.

    Raises:
        GradientIndexError: they do not belong together.
    """
    if index.store not in (None, store.manifest.fingerprint):
        raise GradientIndexError(
            "the index belongs to another store", got=index.store, allowed=store.manifest.fingerprint,
            fix=f"make one with `selector index {store.path} --out index/`",
        )  # fmt: skip


def clusters_table(
    index: GradientIndex, scores: Scores, texts: Texts | None, threshold: float
) -> tuple[pa.Table, int, int]:
    """The largest clusters of near-duplicates.

    Args:
        index: a cosine index of the pool.
        scores: of the pool, which knows the row of each sample.
        texts: where texts come from.
        threshold: lowest cosine of a pair.

    Returns:
        Columns cluster (from 1), size, sample_id, text; how many clusters there are; and how many samples they hold beyond
        the first of each.
    """
    labels = index.duplicates(threshold)
    heads, sizes = np.unique(labels, return_counts=True)
    heads, sizes = heads[sizes > 1], sizes[sizes > 1]
    shown: list[tuple[int, int, str]] = []
    for number, c in enumerate(np.argsort(-sizes, kind="stable")[:CLUSTERS].tolist(), 1):
        members = index.ids[np.flatnonzero(labels == heads[c])[:MEMBERS]].tolist()
        shown += [(number, int(sizes[c]), sample_id) for sample_id in members]
    columns = [list(column) for column in zip(*shown, strict=True)] or [[], [], []]
    table = pa.table([*columns, _previews(columns[2], scores, texts)], schema=CLUSTER_SCHEMA)
    return table, len(heads), int((sizes - 1).sum())


def opposing_table(index: GradientIndex, scores: Scores, texts: Texts | None) -> pa.Table:
    """The most opposed pairs among a sample of the pool and all of it.

    Args:
        index: an index of the pool.
        scores: of the pool, which knows the row of each sample.
        texts: where texts come from.

    Returns:
        Columns similarity (of the two samples), first, second, and the beginnings of their texts.
    """
    asked: Int[np.ndarray, " Q"] = np.unique(np.linspace(0, len(index) - 1, min(QUERIES, len(index))).astype(np.int64))
    pairs: dict[frozenset[str], tuple[float, str, str]] = {}
    names: list[str] = index.ids[asked].tolist()
    found = index.search_ids(names, k=1, opposing=True)
    for i, name in enumerate(names):
        ids, similarities = found[i]
        for other, similarity in zip(ids.tolist(), similarities.tolist(), strict=True):
            pairs.setdefault(frozenset((name, other)), (-similarity, name, other))
    columns = [list(column) for column in zip(*sorted(pairs.values())[:PAIRS], strict=True)] or [[], [], []]
    previews = [_previews(ids, scores, texts) for ids in columns[1:]]
    return pa.table([*columns, *previews], schema=PAIR_SCHEMA)


def _previews(ids: list[str], scores: Scores, texts: Texts | None) -> list[str]:
    """The beginning of each sample's text, on one line; empty without texts."""
    if texts is None:
        return [""] * len(ids)
    rows = scores.rows[find(np.array(ids, dtype=object), scores.ids, "the store")].tolist()
    joined = [
        " ".join(" / ".join(part["text"] for part in texts(row, sample_id)).split())
        for row, sample_id in zip(rows, ids, strict=True)
    ]
    return [text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…" for text in joined]
