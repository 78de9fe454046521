"""The steps from raw vectors to a plan and a filled engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32

from selector.errors import GradientIndexError
from selector.index.backend import Backend, Metric
from selector.index.faiss_backend import FaissFlat, FaissIVF, installed
from selector.index.rotation import Rotation
from selector.index.torch_backend import TorchFlat
from selector.index.tuning import ENERGY, SHORTLIST_FROM, Kind, Plan, RecallMeter, check_device, choose_kind, tune_lists
from selector.index.vectors import check_vectors
from selector.types import Scores

Library = Literal["faiss", "torch"]

FITTED = 100_000
"""Most vectors that the rotation is fitted on."""

MARGIN = 1 / 3
"""Share of the allowed misses that tuning leaves unused: recall is measured on few queries, and on members."""

ROWS = 1 << 17
"""Vectors that are checked and rotated at once."""


def members_table(ids: Sequence[str] | np.ndarray, metadata: Mapping[str, Any], count: int) -> pa.Table:
    """Ids and metadata of a pool as one table, positions as rows.

    Args:
        ids: [N] str.
        metadata: columns [N] by name.
        count: N.

    Raises:
        GradientIndexError: an id is not a string or comes twice, or a column has another length.
    """
    try:
        names = pa.array(list(ids), pa.string())
    except pa.ArrowException as error:
        raise GradientIndexError("ids are strings", got=error) from error
    lengths = {"sample_id": len(names), **{name: len(values) for name, values in metadata.items()}}
    wrong = {name: length for name, length in lengths.items() if length != count}
    if wrong or "sample_id" in metadata:
        raise GradientIndexError(
            "ids and metadata do not fit the vectors",
            got=wrong or "metadata named 'sample_id'",
            allowed=f"{count} of each",
        )
    counted = pc.value_counts(names)  # pyright: ignore[reportAttributeAccessIssue]
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    if repeated or names.null_count:
        raise GradientIndexError("ids are not unique", got=", ".join(map(str, repeated[:5])), allowed="each id once")
    return pa.table(
        {"sample_id": names, **{name: pa.array(values, from_pandas=True) for name, values in metadata.items()}}
    )


def joined_table(members: pa.Table, added: pa.Table) -> pa.Table:
    """The members of an index with others behind them.

    Args:
        members: ids and metadata of the index.
        added: ids and metadata of the others.

    Raises:
        GradientIndexError: an id is there already, or columns differ.
    """
    if set(added.column_names) != set(members.column_names):
        raise GradientIndexError(
            "the metadata has other columns", got=added.column_names[1:], allowed=members.column_names[1:]
        )
    present = pc.is_in(added["sample_id"], value_set=members["sample_id"].combine_chunks())  # pyright: ignore[reportAttributeAccessIssue]
    known = added["sample_id"].filter(present).to_pylist()
    if known:
        raise GradientIndexError(
            f"{len(known)} ids are in the index already", got=", ".join(known[:5]), fix="leave them out"
        )
    try:
        return pa.concat_tables([members, added.select(members.column_names).cast(members.schema)])
    except pa.ArrowException as error:
        raise GradientIndexError("the metadata has other types", got=error, allowed=str(members.schema)) from error


def score_column(ids: np.ndarray, scores: Scores | None) -> dict[str, pa.Array]:
    """Scores as a metadata column in the order of some ids; null where a sample has none, no column without scores.

    Args:
        ids: [N] sample ids.
        scores: of these samples and any others.
    """
    if scores is None:
        return {}
    found = pc.index_in(pa.array(ids.tolist(), pa.string()), value_set=pa.array(scores.ids.tolist(), pa.string()))  # pyright: ignore[reportAttributeAccessIssue]
    return {"score": pa.array(scores.values, pa.float64(), from_pandas=True).take(found)}


def fit_rotation(vectors: Float[np.ndarray, "N D"], ids: pa.ChunkedArray, metric: Metric, seed: int) -> Rotation:
    """Fit the rotation on a pool, or on a random part of a large one.

    Args:
        vectors: as the user gave them.
        ids: of the same rows, for messages.
        metric: decides whether lengths count.
        seed: of the random part.
    """
    if len(vectors) > FITTED:
        part = np.sort(np.random.default_rng(seed).choice(len(vectors), FITTED, replace=False))
        vectors, ids = vectors[part], ids.take(part)
    return Rotation.fit(check_vectors(vectors, ids, metric=metric))


def rotate(
    vectors: Float[np.ndarray, "N D"], ids: pa.ChunkedArray | None, rotation: Rotation, metric: Metric
) -> Float32[np.ndarray, "N R"]:
    """Check, scale and rotate vectors, a block at a time, so that a memory map need not fit in memory twice.

    Args:
        vectors: as the user gave them.
        ids: of the same rows, for messages; row numbers when None.
        rotation: fitted on the first pool.
        metric: decides whether lengths count.
    """
    dimensions, width = rotation.axes.shape
    rotated = np.empty((len(vectors), width), dtype=np.float32)
    for start in range(0, len(vectors), ROWS):
        rows = slice(start, start + ROWS)
        rotated[rows] = rotation.apply(
            check_vectors(vectors[rows], None if ids is None else ids[rows], metric=metric, dimensions=dimensions)
        )
    return rotated


def choose_library(backend: str, device: str) -> Library:
    """The library that searches: what was asked for, else FAISS where it reaches the device, else torch.

    Args:
        backend: `"auto"`, `"faiss"` or `"torch"`.
        device: `"cpu"` or `"cuda"`.

    Raises:
        GradientIndexError: the library is unknown, or cannot be had here.
    """
    if backend not in ("auto", "faiss", "torch"):
        raise GradientIndexError("unknown backend", got=repr(backend), allowed="auto, faiss, torch")
    if backend == "torch" or (backend == "auto" and not installed(device)):
        return "torch"
    if not installed(device):
        raise GradientIndexError(
            f"FAISS cannot search on {device}", got="no faiss build for it", allowed="backend='torch'",
            fix="pip install " + ("faiss-cpu" if device == "cpu" else "faiss-gpu"),
        )  # fmt: skip
    return "faiss"


def flat(vectors: Float32[np.ndarray, "N d"], library: Library, device: str) -> Backend:
    """An exact engine; on a GPU the matrix products of torch, which hold the pool there.

    Args:
        vectors: the pool.
        library: of the engine.
        device: `"cpu"` or `"cuda"`.
    """
    return FaissFlat(vectors) if library == "faiss" and device == "cpu" else TorchFlat(vectors, device)


def plan_engine(
    vectors: Float32[np.ndarray, "N R"],
    rotation: Rotation,
    *,
    metric: Metric,
    kind: Kind | Literal["auto"],
    library: Library,
    device: str,
    recall: float,
    seed: int,
) -> tuple[Plan, Backend]:
    """Choose, fill and tune an engine.

    Args:
        vectors: the rotated pool.
        rotation: its axes and their energy.
        metric: for the plan.
        kind: what was asked for.
        library: `"faiss"` or `"torch"`.
        device: `"cpu"` or `"cuda"`.
        recall: the share of true neighbours to find; somewhat more is aimed at, as the measure is a sample.
        seed: of every random choice.
    """
    count, goal = len(vectors), recall + (1 - recall) * MARGIN
    energy = float(rotation.energy[rotation.quarter - 1])
    exact = flat(vectors, library, device)
    meter = RecallMeter(vectors, exact, seed)
    leading, engine, expansion, reached = vectors.shape[1], exact, 1, 1.0
    if count >= SHORTLIST_FROM and energy >= ENERGY:
        shortlist = flat(np.ascontiguousarray(vectors[:, : rotation.quarter]), library, device)
        needed, recalled = meter.fewest(shortlist, rotation.quarter, goal)
        if recalled >= goal:
            leading, engine, expansion, reached = rotation.quarter, shortlist, needed, recalled
    kind = choose_kind(count, leading, kind, library == "faiss", device)
    n_probe = 0
    if kind != "flat":
        engine = FaissIVF.build(np.ascontiguousarray(vectors[:, :leading]), kind, seed=seed, device=device)
        expansion, n_probe, reached = tune_lists(engine, meter, leading, goal)
    plan = Plan(
        metric=metric, kind=kind, leading=leading, energy=energy, expansion=expansion, n_probe=n_probe,
        recall=reached, goal=recall,
    )  # fmt: skip
    return plan, engine


def open_engine(
    plan: Plan, files: Mapping[str, Path], vectors: Float32[np.ndarray, "N R"], library: Library, device: str
) -> Backend:
    """The engine of a saved index, over memory maps.

    Args:
        plan: of the saved index.
        files: path of each role's file; their checksums were compared.
        vectors: the whole vectors.
        library: `"faiss"` or `"torch"`.
        device: `"cpu"` or `"cuda"`.

    Raises:
        GradientIndexError: the index has inverted lists, and FAISS cannot be had or cannot search them on the device.
    """
    if plan.kind == "flat":
        return flat(np.load(files["leading"], mmap_mode="r") if "leading" in files else vectors, library, device)
    if library != "faiss":
        raise GradientIndexError(
            f"an index of kind {plan.kind!r} takes FAISS",
            got="the torch backend",
            allowed="backend='faiss'",
            fix="pip install faiss-cpu",
        )
    check_device(plan.kind, device)
    engine = FaissIVF.open(files["lists"], device)
    engine.n_probe = plan.n_probe
    return engine
