"""The index: vectors in, sample ids out.

A pool of vectors (standardized spectral features, gradient sketches, anything that compares samples) is scaled to length 1
under cosine, rotated into Matryoshka order (`rotation`), and searched in two steps: an engine names candidates, looking at
the leading dimensions alone where those hold enough of every distance, and the candidates are ranked on the whole vectors.
The trade-off is explicit: small pools are searched exactly, larger ones by inverted lists that are tuned at build time to a
recall which is then reported.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from selector.errors import GradientIndexError
from selector.index import storage
from selector.index.backend import Metric
from selector.index.building import (
    choose_library,
    fit_rotation,
    joined_table,
    members_table,
    open_engine,
    plan_engine,
    rotate,
    score_column,
)
from selector.index.faiss_backend import FaissIVF
from selector.index.members import MemberPool
from selector.index.rotation import Rotation
from selector.index.tuning import Kind, Plan
from selector.index.vectors import Method, Standardization, read_features
from selector.store.reader import FeatureStore
from selector.types import MEASURES, Scores


class GradientIndex(MemberPool):
    """Vectors of samples, searchable by id, by vector and by metadata. Make one with `build`, `from_vectors` or `open`.

    It answers what policies ask (`selector.neighbours.Neighbours`): neighbours, a neighbour graph, and near-duplicates.

    Args:
        standardization: how features became vectors, where the vectors are spectral features.
        store: fingerprint of the feature store, where there is one.
        pool: the arguments of `MemberPool`.
    """

    def __init__(
        self,
        *,
        standardization: Standardization | None = None,
        store: str | None = None,
        **pool: Any,
    ) -> None:
        super().__init__(**pool)
        self.standardization, self.store = standardization, store

    @classmethod
    def build(
        cls,
        store: FeatureStore,
        *,
        measures: Sequence[str] = MEASURES,
        method: Method = "z",
        scores: Scores | None = None,
        **options: Any,
    ) -> GradientIndex:
        """Index the spectral features of a feature store; samples without a score are left out.

        Args:
            store: an open feature store.
            measures: which measures make the vectors.
            method: how features are standardized: `"z"`, or `"robust"` against outliers.
            scores: adds the metadata column `score` for filters; null for samples that it does not hold.
            options: as for `from_vectors`.

        Raises:
            GradientIndexError: no sample has a score, or an option is out of range.
        """
        ids, features, metadata = read_features(store, measures)
        if len(ids) == 0:
            raise GradientIndexError(
                f"the store at {store.path} holds no sample with a score", fix="finish `selector score`"
            )
        standardization = Standardization.fit(features, [spec.key for spec in store.layers], method)
        metadata = {**metadata, **score_column(ids, scores)}
        index = cls.from_vectors(ids, standardization.apply(features), metadata, **options)
        index.standardization, index.store = standardization, store.manifest.fingerprint
        return index

    @classmethod
    def from_vectors(
        cls,
        ids: Sequence[str] | np.ndarray,
        vectors: Float[np.ndarray, "N D"],
        metadata: Mapping[str, Any] | None = None,
        *,
        metric: Metric = "cosine",
        kind: Kind | Literal["auto"] = "auto",
        backend: Literal["auto", "faiss", "torch"] = "auto",
        device: Literal["cpu", "cuda"] = "cpu",
        recall: float = 0.99,
        seed: int = 0,
    ) -> GradientIndex:
        """Index any vectors, such as gradient sketches.

        Args:
            ids: [N] str, unique.
            vectors: [N, D], any float type; may be a memory map.
            metadata: columns [N] by name that filters can use, such as `source`, `n_tokens`, `score`.
            metric: `"cosine"`, or `"l2"` for Euclidean distance.
            kind: exact (`"flat"`), inverted lists (`"ivf"`), compressed ones (`"ivf-sq8"`, `"ivf-pq"`), or by size (`"auto"`).
            backend: `"faiss"`, `"torch"`, or FAISS where it reaches the device (`"auto"`).
            device: `"cpu"` or `"cuda"`.
            recall: share of the true ten nearest that inverted lists and shortlists are tuned to find.
            seed: of every random choice.

        Raises:
            GradientIndexError: ids are not unique, vectors cannot be compared, or an option is out of range.
        """
        if metric not in ("cosine", "l2"):
            raise GradientIndexError("unknown metric", got=repr(metric), allowed="cosine, l2")
        if not 0 < recall < 1:
            raise GradientIndexError("recall is out of range", got=recall, allowed="between 0 and 1, both excluded")
        library = choose_library(backend, device)
        members = members_table(ids, metadata or {}, len(vectors))
        rotation = fit_rotation(vectors, members["sample_id"], metric, seed)
        whole = rotate(vectors, members["sample_id"], rotation, metric)
        plan, engine = plan_engine(
            whole, rotation, metric=metric, kind=kind, library=library, device=device, recall=recall, seed=seed
        )
        return cls(
            members=members, vectors=whole, rotation=rotation, plan=plan, engine=engine, library=library, device=device
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: Literal["auto", "faiss", "torch"] = "auto",
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> GradientIndex:
        """Open a saved index by memory maps.

        Args:
            path: the index's directory.
            backend: as for `from_vectors`.
            device: `"cpu"` or `"cuda"`.

        Raises:
            GradientIndexError: there is no index, it is damaged, or its engine cannot be had.
        """
        manifest, files = storage.read(Path(path))
        library = choose_library(backend, device)
        plan = Plan(**manifest["plan"])
        vectors = np.load(files["vectors"], mmap_mode="r")
        with np.load(files["space"]) as space:
            rotation = Rotation(space["axes"], space["energy"])
            features = manifest["features"]
            standardization = features and Standardization(
                tuple(features["measures"]),
                tuple(features["layers"]),
                space["center"],
                space["scale"],
                features["missing"],
            )
        return cls(
            members=pq.read_table(files["members"]), vectors=vectors, rotation=rotation, plan=plan, library=library, device=device,
            engine=open_engine(plan, files, vectors, library, device), standardization=standardization, store=manifest["store"],
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the index; what was there before stays valid until the last moment.

        Args:
            path: a directory, new, empty or holding an index.

        Raises:
            GradientIndexError: the directory holds something else.
        """
        space = {"axes": self._rotation.axes, "energy": self._rotation.energy}
        fit, features = self.standardization, None
        if fit is not None:
            space |= {"center": fit.center, "scale": fit.scale}
            features = {"measures": fit.measures, "layers": fit.layers, "missing": fit.missing}
        writers: dict[str, Callable[[Path], object]] = {
            "members": lambda file: pq.write_table(self._members, file, compression="zstd"),
            "space": lambda file: np.savez(file, allow_pickle=False, **space),
            "vectors": lambda file: np.save(file, self._vectors),
        }
        if isinstance(self._engine, FaissIVF):
            writers["lists"] = self._engine.save
        elif self.plan.leading < self._vectors.shape[1]:
            writers["leading"] = lambda file: np.save(file, self._vectors[:, : self.plan.leading])
        versions = {"python": platform.python_version(), "numpy": np.__version__, "engine": self._engine.name}
        manifest = {
            "count": len(self),
            "plan": dataclasses.asdict(self.plan),
            "features": features,
            "store": self.store,
            "versions": versions,
        }
        storage.write(Path(path), writers, manifest)

    @staticmethod
    def verify(path: str | Path) -> None:
        """Compare the checksums of all files of a saved index, the large arrays included.

        Args:
            path: the index's directory.

        Raises:
            GradientIndexError: files are missing or damaged; all of them at once.
        """
        storage.read(Path(path), whole=True)

    @property
    def description(self) -> str:
        """What was chosen, why, and what it reaches, in one line."""
        missing = self.standardization.missing if self.standardization is not None else 0
        filled = f"; {missing:,} missing features set to the center" if missing else ""
        return super().description + filled

    def add(
        self,
        ids: Sequence[str] | np.ndarray,
        vectors: Float[np.ndarray, "M D"],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Append vectors; rotation, standardization and tuning stay as they were built.

        Args:
            ids: [M] str, none of them in the index.
            vectors: [M, D] in the space that was indexed.
            metadata: the metadata columns of the index, [M] each.

        Raises:
            GradientIndexError: an id is there already, columns differ, or vectors cannot be compared.
        """
        added = members_table(ids, metadata or {}, len(vectors))
        members = joined_table(self._members, added)
        rows = rotate(vectors, added["sample_id"], self._rotation, self.plan.metric)
        self._add(members, rows)

    def add_store(self, store: FeatureStore, scores: Scores | None = None) -> None:
        """Append the scored samples of another store, standardized as the first one was.

        Args:
            store: an open feature store of the same model and layers.
            scores: as for `build`.

        Raises:
            GradientIndexError: the index holds no spectral features, or the store has other layers.
        """
        fit = self.standardization
        keys = tuple(spec.key for spec in store.layers)
        if fit is None or keys != fit.layers:
            raise GradientIndexError(
                "the store does not fit the index", got=f"{len(keys)} layers", allowed=f"{len(fit.layers)} layers of the indexed store" if fit else "vectors",
                fix="build an index of its own" if fit else "use add",
            )  # fmt: skip
        ids, features, metadata = read_features(store, fit.measures)
        self.add(ids, fit.apply(features), {**metadata, **score_column(ids, scores)})
