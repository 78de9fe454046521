"""From a store and selections to the tables that a report is made of.

Every table is an Arrow table, `.to_pandas()` away from a data frame, and can be kept as Parquet. Nothing here runs a model:
tokens and whole spectra of chosen samples come from the side table that `selector score --explain` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selector.errors import SelectionError
from selector.index import GradientIndex
from selector.report import features, groups, samples, shapes, similar
from selector.runtime import versions
from selector.selecting.run import find
from selector.selection import Selection
from selector.store import FeatureStore
from selector.store.explanations import read_explanations
from selector.types import Scores

if TYPE_CHECKING:
    import datasets

NEAR_DUPLICATE = 0.999
"""Lowest cosine of near-duplicates; standardized spectra of unrelated samples of one length reach 0.99."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What a report is made from."""

    store: FeatureStore
    """Features of the pool."""
    scores: Mapping[str, Scores]
    """Scores of the pool by name; the first is the one that was selected by."""
    selections: Mapping[str, Selection] = field(default_factory=dict)
    """Selections by name, the most important one first."""
    controls: Mapping[str, Selection] = field(default_factory=dict)
    """The random control of each selection, by the name of the selection."""
    dataset: datasets.Dataset | None = None
    """The rows that were scored; without them texts are left out."""
    index: GradientIndex | None = None
    """An index of the pool; without it near-duplicates and opposites are left out."""


@dataclass(frozen=True, eq=False)
class Report:
    """Tables, and the plain facts that belong to them."""

    tables: dict[str, pa.Table]
    """By name: comparison, sources, costs, layers, correlations, cells, lines, distributions, samples, explanations,
    clusters, opposing, refused."""
    about: dict[str, Any]
    """Plain values: where everything comes from and how to make it again."""

    def save(self, directory: str | Path) -> None:
        """Write each table as one Parquet file.

        Args:
            directory: made when missing; files of the same names are replaced.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            pq.write_table(table, folder / f"{name}.parquet", compression="zstd")


def build_report(evidence: Evidence) -> Report:
    """Make every table of a report.

    Args:
        evidence: store, scores, selections, and what else is at hand.

    Raises:
        SelectionError: the scores or a selection belong to other samples than the store.
        DataError: the data set is not the one that was scored.
        GradientIndexError: the index belongs to another store.
        StoreError: a file of the store is damaged.
    """
    store, manifest = evidence.store, evidence.store.manifest
    by, scores = next(iter(evidence.scores.items()))
    facts = store.to_arrow(["sample_id", "row", "status", "loss", "truncated"])
    if not np.array_equal(facts["sample_id"].to_numpy(), scores.ids):
        raise SelectionError(
            "the scores are not of this store", got=f"{len(scores)} scored samples", allowed=f"the {len(facts)} samples of {store.path}",
            fix="name the store that the selection was made from",
        )  # fmt: skip
    selections, controls = (_placed(named, scores) for named in (evidence.selections, evidence.controls))
    texts = samples.Texts(evidence.dataset, manifest) if evidence.dataset is not None else None
    members = groups.groups(scores, selections, controls)
    cells, lines = shapes.length_tables(evidence.scores, members)
    tables = {
        "comparison": groups.comparison_table(scores, selections, controls),
        "sources": groups.sources_table(scores, selections),
        "costs": groups.costs_table(store),
        "layers": features.layer_means(store, members),
        "correlations": shapes.correlations_table(evidence.scores),
        "cells": cells,
        "lines": lines,
        "distributions": shapes.distributions_table(scores, members),
        "samples": samples.samples_table(scores, facts, selections, texts),
        "explanations": read_explanations(store.path, manifest.fingerprint),
        "refused": groups.refused_table(facts, selections),
    }
    about: dict[str, Any] = {
        "by": by,
        "store": str(store.path),
        "fingerprint": manifest.fingerprint,
        "expected": manifest.expected,
        "samples": len(facts),
        "identity": manifest.identity,
        "command": manifest.command,
        "versions": manifest.versions,
        "versions_of_report": versions(),
        "layers": len({spec.layer for spec in store.layers}),
        "projections": list(dict.fromkeys(spec.projection for spec in store.layers)),
        "score": scores.provenance,
        "selections": {name: selection.provenance for name, selection in selections.items()},
        "controls": {name: control.provenance.get("seed") for name, control in controls.items()},
    }
    if evidence.index is not None:
        tables |= _similarity(evidence.index, store, scores, texts, about)
    return Report(tables, about)


def _similarity(
    index: GradientIndex, store: FeatureStore, scores: Scores, texts: samples.Texts | None, about: dict[str, Any]
) -> dict[str, pa.Table]:
    similar.check_index(index, store)
    pa.default_memory_pool().release_unused()  # what the readers of shards have freed is kept until then
    about["index"] = {"description": index.description, "asked": min(similar.QUERIES, len(index))}
    found: dict[str, pa.Table] = {}
    if index.plan.metric == "cosine":
        found["clusters"], clusters, repeated = similar.clusters_table(index, scores, texts, NEAR_DUPLICATE)
        about["index"] |= {"threshold": NEAR_DUPLICATE, "clusters": clusters, "repeated": repeated}
    found["opposing"] = similar.opposing_table(index, scores, texts)
    return found


def _placed(named: Mapping[str, Selection], scores: Scores) -> dict[str, Selection]:
    """The same selections with the rows that the pool has for their ids; an error names ids that it does not hold."""
    return {name: replace(one, rows=scores.rows[find(one.ids, scores.ids, "the store")]) for name, one in named.items()}
