"""The pool, its sources, the selections and their controls, as sets of rows; and the tables that compare them.

Row numbers of the data set name the samples, because they are what every shard, score and selection carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from selector.policies.base import groups_of
from selector.selecting import compare
from selector.selection import Selection
from selector.store import FeatureStore
from selector.types import Scores

POOL = "pool"
OTHER = "other sources"
MOST_SOURCES = 8
"""Sources that are shown by name; the smaller ones are one group."""


@dataclass(frozen=True)
class Group:
    """Samples that are looked at together."""

    kind: str
    """`pool`, `source`, `selection` or `control`."""
    name: str
    """What it is called."""
    rows: Int[np.ndarray, " K"]
    """Rows of the data set."""

    @property
    def title(self) -> str:
        """Its name among groups of all kinds."""
        return {"source": f"source {self.name}", "control": f"{self.name}: matched random"}.get(self.kind, self.name)


def groups(scores: Scores, selections: Mapping[str, Selection], controls: Mapping[str, Selection]) -> list[Group]:
    """Every group of a report: the pool, its largest sources, the selections, each followed by its control.

    Args:
        scores: the pool.
        selections: by name.
        controls: the random control of each selection, by the name of the selection.
    """
    scored = np.isfinite(scores.values)
    found = [Group("pool", POOL, scores.rows[scored])]
    names = source_names(scores.source)
    if len(set(names[scored].tolist())) > 1:
        order = [name for name, _ in Counter(names[scored].tolist()).most_common()]
        found += [Group("source", name, scores.rows[scored & (names == name)]) for name in order]
    for name, selection in selections.items():
        found.append(Group("selection", name, selection.rows))
        if name in controls:
            found.append(Group("control", name, controls[name].rows))
    return found


def source_names(source: np.ndarray) -> np.ndarray:
    """[N] str: the source of each sample, with one name for no source and one for all small ones.

    Args:
        source: [N] str.
    """
    names, codes = groups_of(source)
    order = np.argsort(-np.bincount(codes, minlength=len(names)), kind="stable")
    kept = set(order[:MOST_SOURCES].tolist()) if len(names) > MOST_SOURCES + 1 else set(range(len(names)))
    shown = [(name or "(none)") if i in kept else OTHER for i, name in enumerate(names)]
    return np.array(shown, dtype=object)[codes]


def members(group: Group, rows: Int[np.ndarray, " N"]) -> Int[np.ndarray, " _"]:
    """Positions in a pool of the samples of a group.

    Args:
        group: rows that are all in the pool.
        rows: of the pool, ascending.
    """
    return np.searchsorted(rows, group.rows)


def sources_table(scores: Scores, selections: Mapping[str, Selection]) -> pa.Table:
    """Samples and tokens of each source: in the pool, and picked by each selection.

    Args:
        scores: the pool.
        selections: by name.
    """
    names = source_names(scores.source)
    order = [name for name, _ in Counter(names.tolist()).most_common()]
    columns: dict[str, list[str] | list[int]] = {
        "source": order,
        "samples": [int((names == name).sum()) for name in order],
        "tokens": [int(scores.n_tokens[names == name].sum()) for name in order],
    }
    for title, selection in selections.items():
        at = np.searchsorted(scores.rows, selection.rows)
        columns[f"{title}: samples"] = [int((names[at] == name).sum()) for name in order]
        columns[f"{title}: tokens"] = [int(scores.n_tokens[at][names[at] == name].sum()) for name in order]
    return pa.table(columns)


def comparison_table(
    scores: Scores, selections: Mapping[str, Selection], controls: Mapping[str, Selection]
) -> pa.Table:
    """The pool, each selection and its control side by side.

    Args:
        scores: the pool.
        selections: by name.
        controls: by the name of the selection.

    Returns:
        Samples, tokens, share of the pool's tokens, quartiles of length, the probability that a sample is longer than one
        of the pool, how far sources are shifted, and overlap with the first selection.
    """
    scored = np.isfinite(scores.values)
    whole = Selection(
        ids=scores.ids[scored], rows=scores.rows[scored], weights=np.ones(int(scored.sum())), scores=scores.values[scored],
        n_tokens=scores.n_tokens[scored], reasons=np.full(int(scored.sum()), "", dtype=object),
    )  # fmt: skip
    named = {POOL: whole}
    for name, selection in selections.items():
        named[name] = selection
        if name in controls:
            named[f"{name}: matched random"] = controls[name]
    first = next(iter(selections.values()), whole)
    records = []
    for name, selection in named.items():
        against_pool, against_first = compare(whole, selection, scores), compare(first, selection, scores)
        profile = against_pool.second
        quartiles = dict(zip(("tokens_q1", "tokens_median", "tokens_q3"), profile.length_quartiles, strict=True))
        records.append(
            {
                "group": name, "samples": profile.samples, "tokens": profile.tokens,
                "share_of_tokens": profile.tokens / max(against_pool.first.tokens, 1), **quartiles,
                "longer_than_pool": against_pool.length_shift, "source_shift": against_pool.source_shift,
                "shared_with_first": against_first.shared, "jaccard_with_first": against_first.jaccard,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(records)


def costs_table(store: FeatureStore) -> pa.Table:
    """The store's cost ledger, one row per run.

    Args:
        store: an open feature store.
    """
    return pa.Table.from_pylist([dict(entry) for entry in store.manifest.cost])


def refused_table(samples: pa.Table, selections: Mapping[str, Selection]) -> pa.Table:
    """What did not take part, how often, and by whose decision.

    Args:
        samples: status and truncated of every sample.
        selections: by name.
    """
    statuses = Counter(samples["status"].to_pylist())
    records = [
        {"by": "scoring", "reason": status, "samples": n} for status, n in statuses.most_common() if status != "ok"
    ]
    if cut := sum(samples["truncated"].to_pylist()):
        records.append({"by": "scoring", "reason": "truncated, and scored as what is left", "samples": cut})
    for name, selection in selections.items():
        records += [
            {"by": name, "reason": what, "samples": n} for what, n in selection.provenance.get("removed", {}).items()
        ]
    schema = pa.schema([("by", pa.string()), ("reason", pa.string()), ("samples", pa.int64())])
    return pa.Table.from_pylist(records, schema=schema)
