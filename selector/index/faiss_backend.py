"""FAISS engines: exact search over an array, and inverted files (IVF) with 16-bit, 8-bit or 4-bit codes.

This is the only file that knows FAISS. Its fillers (position -1 where a list ran out) are turned into counts before
anything leaves. Inverted files live in FAISS's own format and are opened as memory maps; the exact engine needs no file,
as it searches the pool's array in place. The 4-bit codes are a product quantizer of single dimensions in FAISS's fast-scan
layout: on 200,000 clustered vectors they took a fourth of the time of whole codes for the same recall after ranking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from selector.errors import GradientIndexError
from selector.index.backend import Candidates

Kind = Literal["ivf", "ivf-sq8", "ivf-pq"]

TRAINING_PER_LIST = 40
"""Vectors per inverted list that k-means is trained on; FAISS asks for at least 39."""

ROWS = 1 << 20
"""Most rows of a filtered pool that are copied at once."""

PRODUCTS_FROM = 12
"""Fewest queries for which matrix products beat one distance after another; measured at 32 and at 128 dimensions."""


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise GradientIndexError(
            "FAISS is not installed", got=str(error), allowed="faiss-cpu or faiss-gpu",
            fix="pip install faiss-cpu, or ask for backend='torch'",
        ) from error  # fmt: skip
    return faiss


def installed(device: str) -> bool:
    """Whether FAISS can be imported and reach the device.

    Args:
        device: `"cpu"`, or `"cuda"`, which takes the faiss-gpu build and a visible GPU.
    """
    try:
        faiss = _faiss()
    except GradientIndexError:
        return False
    return device == "cpu" or (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)


@contextmanager
def _route(faiss: Any, queries: int) -> Iterator[None]:
    """Choose how FAISS computes distances, and put its settings back afterwards.

    Its own threshold for matrix products counts queries in some versions and numbers in others. Over one query two threads
    took several times as long as one.
    """
    threshold, threads = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    faiss.cvar.distance_compute_blas_threshold = 0 if queries >= PRODUCTS_FROM else 1 << 30
    faiss.omp_set_num_threads(1 if queries == 1 else threads)
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
        faiss.omp_set_num_threads(threads)


def n_lists(count: int) -> int:
    """Number of inverted lists for a pool: eight times the square root, within FAISS's guidelines, in whole powers of two.

    Args:
        count: vectors in the pool.
    """
    return int(2 ** round(np.log2(8 * np.sqrt(max(count, 64)))))


class FaissFlat:
    """Exact search over an array on the CPU; the array may be a memory map.

    Args:
        vectors: [N, d] the pool.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N d"]) -> None:
        self._faiss, self._vectors = _faiss(), vectors

    @property
    def name(self) -> str:
        """Engine and version, for descriptions."""
        return f"faiss-cpu {self._faiss.__version__}"

    def __len__(self) -> int:
        return len(self._vectors)

    def candidates(
        self, queries: Float32[np.ndarray, "Q d"], k: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> Candidates:
        """Propose the k members nearest to each query.

        Args:
            queries: contiguous rows.
            k: how many to propose; fewer come where fewer are allowed.
            allowed: which members may be proposed; all when None.
        """
        rows = None if allowed is None else np.flatnonzero(allowed)
        count = len(self) if rows is None else len(rows)
        k = min(k, count)
        if k == 0 or len(queries) == 0:
            return Candidates(np.zeros((len(queries), k), np.int64), np.full(len(queries), k))
        if rows is None:
            with _route(self._faiss, len(queries)):
                positions = self._faiss.knn(queries, self._vectors, k)[1]
        else:
            parts = [self._nearest(queries, rows[start : start + ROWS], k) for start in range(0, count, ROWS)]
            distances, merged = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
            order = np.argsort(distances, axis=1, kind="stable")[:, :k]
            positions = np.take_along_axis(merged, order, axis=1)
        return Candidates(positions, np.full(len(queries), k))

    def _nearest(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with _route(self._faiss, len(queries)):
            distances, positions = self._faiss.knn(queries, self._vectors[rows], min(k, len(rows)))
        return distances, rows[positions]


class FaissIVF:
    """Approximate search: only the `n_probe` lists whose centroids are nearest to a query are read.

    Args:
        index: a trained FAISS inverted-file index.
        path: the file that it maps, if any; `extend` first reads it into memory.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, index: Any, path: Path | None = None, device: str = "cpu") -> None:
        self._faiss, self._index, self._path, self._device = _faiss(), index, path, device
        self._engine = self._faiss.index_cpu_to_all_gpus(index) if device == "cuda" else index
        self.n_probe = 1

    @classmethod
    def build(cls, vectors: Float32[np.ndarray, "N d"], kind: Kind, *, seed: int = 0, device: str = "cpu") -> FaissIVF:
        """Train the lists on a random part of the pool and fill them.

        Args:
            vectors: [N, d] the pool, d a multiple of 8.
            kind: `"ivf"` keeps 16 bits per dimension (bfloat16, which spans every scale), `"ivf-sq8"` 8 bits, `"ivf-pq"` 4 bits, compared in registers.
            seed: of the random part and of k-means.
            device: `"cpu"` or `"cuda"`.
        """
        faiss = _faiss()
        count, dimensions = vectors.shape
        lists = n_lists(count)
        quantizer = faiss.IndexFlatL2(dimensions)
        if kind == "ivf-pq":
            index = faiss.IndexIVFPQFastScan(quantizer, dimensions, lists, dimensions, 4)
        else:
            codes = faiss.ScalarQuantizer.QT_bf16 if kind == "ivf" else faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexIVFScalarQuantizer(quantizer, dimensions, lists, codes)
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1
        sample = min(count, max(TRAINING_PER_LIST * lists, 16_384))
        training = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))
        index.train(np.ascontiguousarray(vectors[training]))
        index.add(np.ascontiguousarray(vectors))
        return cls(index, device=device)

    @classmethod
    def open(cls, path: Path, device: str = "cpu") -> FaissIVF:
        """Map a file that `save` wrote; the caller has compared its checksum.

        Args:
            path: the file.
            device: `"cpu"` or `"cuda"`.
        """
        faiss = _faiss()
        flags = faiss.IO_FLAG_MMAP if device == "cpu" else 0
        index = faiss.read_index(str(path), flags)
        lists = faiss.downcast_InvertedLists(index.invlists)
        if isinstance(lists, faiss.OnDiskInvertedLists):
            lists.prefetch_nthread = 0  # starting 32 threads per search costs milliseconds; lists in use are in memory
        return cls(index, path, device)

    def save(self, path: Path) -> None:
        """Write FAISS's own file.

        Args:
            path: the file.
        """
        self._faiss.write_index(self._index, str(path))

    @property
    def name(self) -> str:
        """Engine and version, for descriptions."""
        return f"faiss-{'gpu' if self._device == 'cuda' else 'cpu'} {self._faiss.__version__}"

    @property
    def lists(self) -> int:
        """Number of inverted lists."""
        return self._index.nlist

    def __len__(self) -> int:
        return self._index.ntotal

    def candidates(
        self, queries: Float32[np.ndarray, "Q d"], k: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> Candidates:
        """Propose k near members for each query.

        Args:
            queries: contiguous rows.
            k: how many to propose; fewer come where the probed lists hold fewer.
            allowed: which members may be proposed; all when None. More lists are probed the fewer are allowed.
        """
        probes, selector, engine = self.n_probe, None, self._engine
        if allowed is not None:
            probes = min(self.lists, int(np.ceil(probes * len(self) / max(1, int(allowed.sum())))))
            bits = np.packbits(allowed, bitorder="little")
            # FAISS on a GPU takes no selector
            engine = self._index
            selector = self._faiss.IDSelectorBitmap(len(allowed), self._faiss.swig_ptr(bits))
        parameters = self._faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        with _route(self._faiss, len(queries)):
            positions: Int64[np.ndarray, "Q K"] = engine.search(queries, k, params=parameters)[1]
        return Candidates(np.maximum(positions, 0), (positions >= 0).sum(axis=1))

    def extend(self, vectors: Float32[np.ndarray, "M d"]) -> None:
        """Append vectors to the lists; a mapped file is read into memory first.

        Args:
            vectors: the new rows, contiguous.
        """
        if self._path is not None:
            self._index, self._path = self._faiss.read_index(str(self._path)), None
        self._index.add(vectors)
        self._engine = self._faiss.index_cpu_to_all_gpus(self._index) if self._device == "cuda" else self._index
