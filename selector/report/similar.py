"""Samples whose spectra are nearly the same, and samples whose spectra are opposite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from selector.errors import GradientIndexError
from selector.index import GradientIndex
from selector.report.samples import Texts
from selector.store import FeatureStore

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
    index: GradientIndex, rows: dict[str, int], texts: Texts | None, threshold: float
) -> tuple[pa.Table, int, int]:
    """The largest clusters of near-duplicates.

    Args:
        index: a cosine index of the pool.
        rows: row of each sample id.
        texts: where texts come from.
        threshold: lowest cosine of a pair.

    Returns:
        Columns cluster (from 1), size, sample_id, text; how many clusters there are; and how many samples they hold beyond
        the first of each.
    """
    labels = index.duplicates(threshold)
    heads, sizes = np.unique(labels, return_counts=True)
    heads, sizes = heads[sizes > 1], sizes[sizes > 1]
    records = []
    for number, c in enumerate(np.argsort(-sizes, kind="stable")[:CLUSTERS].tolist(), 1):
        for sample_id in index.ids[np.flatnonzero(labels == heads[c])[:MEMBERS]].tolist():
            records.append(
                {
                    "cluster": number,
                    "size": int(sizes[c]),
                    "sample_id": sample_id,
                    "text": _preview(sample_id, rows, texts),
                }
            )
    return pa.Table.from_pylist(records, schema=CLUSTER_SCHEMA), len(heads), int((sizes - 1).sum())


def opposing_table(index: GradientIndex, rows: dict[str, int], texts: Texts | None) -> pa.Table:
    """The most opposed pairs among a sample of the pool and all of it.

    Args:
        index: an index of the pool.
        rows: row of each sample id.
        texts: where texts come from.

    Returns:
        Columns similarity (of the two samples), first, second, and the beginnings of their texts.
    """
    asked: Int[np.ndarray, " Q"] = np.unique(np.linspace(0, len(index) - 1, min(QUERIES, len(index))).astype(np.int64))
    names: Sequence[str] = index.ids[asked].tolist()
    pairs: dict[frozenset[str], tuple[float, str, str]] = {}
    found = index.search_ids(names, k=1, opposing=True)
    for i, name in enumerate(names):
        ids, similarities = found[i]
        for other, similarity in zip(ids.tolist(), similarities.tolist(), strict=True):
            pairs.setdefault(frozenset((name, other)), (-similarity, name, other))
    records = [
        {
            "similarity": similarity,
            "first": a,
            "second": b,
            "first_text": _preview(a, rows, texts),
            "second_text": _preview(b, rows, texts),
        }
        for similarity, a, b in sorted(pairs.values())[:PAIRS]
    ]
    return pa.Table.from_pylist(records, schema=PAIR_SCHEMA)


def _preview(sample_id: str, rows: dict[str, int], texts: Texts | None) -> str:
    if texts is None:
        return ""
    joined = " ".join(" / ".join(part["text"] for part in texts(rows[sample_id], sample_id)).split())
    return joined if len(joined) <= PREVIEW else joined[: PREVIEW - 1] + "…"
