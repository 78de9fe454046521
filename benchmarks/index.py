"""The index at a million vectors: recall against exact search, time per query, build and open, near-duplicates.

    python benchmarks/index.py                       as reported: 1,000,000 x 128, under five minutes on two free cores
    python benchmarks/index.py --count 100000        smaller
    python benchmarks/index.py --rows ivf duplicates some rows

The data are 2,000 clusters whose standard deviations fall as (1, 2, ... 128)^-0.75 along hidden axes, turned at random. A
quarter of the dimensions then holds 0.9 of the energy, as measured. Queries are fresh draws, not members. `plain` is exact
search with NumPy in the same run. Results go to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin lose whole time slices where others work too

import numpy as np

from selector.index import GradientIndex
from selector.index.faiss_backend import FaissFlat

RESULTS = Path(__file__).parent / "results"
DIMENSIONS = 128
CLUSTERS = 2000
DECAY = 0.75
SPREAD = 0.6
THRESHOLD = 0.99
SINGLE, BATCH = 200, 2000
KINDS = ("ivf", "ivf-sq8", "ivf-pq")


def draw(count: int, seed: int) -> np.ndarray:
    """Unit vectors [count, 128] float32 of the clustered data; the clusters and axes are the same for every seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    decay = np.arange(1, DIMENSIONS + 1, dtype=np.float32) ** -DECAY
    centers = fixed.standard_normal((CLUSTERS, DIMENSIONS), dtype=np.float32)
    axes = np.linalg.qr(fixed.standard_normal((DIMENSIONS, DIMENSIONS)))[0].astype(np.float32)
    vectors = SPREAD * rng.standard_normal((count, DIMENSIONS), dtype=np.float32)
    vectors += centers[rng.integers(0, CLUSTERS, count)]
    vectors = (vectors * decay) @ axes
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    start = clock()
    result = work()
    return clock() - start, result


def per_query(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, float]:
    """Milliseconds per query: the median of single queries and the mean in one batch; and the same in processor time.

    Processor time is the sum over threads and hardly depends on other work on the machine.
    """
    search(queries[:2])
    single = [timed(lambda q=q: search(queries[q : q + 1]))[0] for q in range(SINGLE)]
    single_cpu = timed(lambda: [search(queries[q : q + 1]) for q in range(SINGLE)], time.process_time)[0]
    batch_cpu, (batch, _) = timed(lambda: timed(lambda: search(queries)), time.process_time)
    numbers = {
        "ms (one query)": float(np.median(single)), "ms (batch)": batch / len(queries),
        "cpu ms (one query)": single_cpu / SINGLE, "cpu ms (batch)": batch_cpu / len(queries),
    }  # fmt: skip
    return {name: round(1e3 * value, 3) for name, value in numbers.items()}


def row_plain(pool: np.ndarray, queries: np.ndarray, names: list[str], truth: np.ndarray) -> dict[str, Any]:
    """Exact search as one would write it in NumPy, and as FAISS does it over all dimensions."""

    def plain(asked: np.ndarray) -> None:
        np.argpartition(-(asked @ pool.T), 10, axis=1)

    single = float(np.median([timed(lambda q=q: plain(queries[q : q + 1]))[0] for q in range(20)]))
    whole = per_query(lambda asked: FaissFlat(pool).candidates(asked, 10), queries)
    return {
        "numpy ms (one query)": round(1e3 * single, 2),
        **{f"faiss flat {name}": value for name, value in whole.items()},
    }


def row_shortlist(pool: np.ndarray, queries: np.ndarray, names: list[str], truth: np.ndarray) -> dict[str, Any]:
    """A quarter of the dimensions as shortlist, ranked on all, against full search."""
    index = GradientIndex.from_vectors(names, pool, kind="flat")
    full = FaissFlat(pool)
    short = per_query(lambda asked: index.search(asked, 10), queries)
    whole = per_query(lambda asked: full.candidates(asked, 10), queries)
    faster = {name.replace("ms", "times faster", 1): round(whole[name] / short[name], 2) for name in short}
    return {"recall@10": recall(index, queries, truth), **short, **faster, "description": index.description}


def row_kind(kind: str, pool: np.ndarray, queries: np.ndarray, names: list[str], truth: np.ndarray) -> dict[str, Any]:
    """Build, save, open by memory map, and search one kind of inverted lists."""
    make = lambda: timed(lambda: GradientIndex.from_vectors(names, pool, kind=kind))  # type: ignore[arg-type]  # noqa: E731
    build_cpu, (build, index) = timed(make, time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        save = timed(lambda: index.save(folder))[0]
        engine_bytes = next(Path(folder).glob("lists-*")).stat().st_size
        opening, opened = timed(lambda: GradientIndex.open(folder))
        speed = per_query(lambda asked: opened.search(asked, 10), queries)
        reached = recall(opened, queries, truth)
    return {
        "recall@10": reached, **speed, "build s": round(build, 1), "build cpu s": round(build_cpu, 1), "save s": round(save, 1),
        "open s": round(opening, 3), "engine bytes per vector": round(engine_bytes / len(pool), 1), "description": index.description,
    }  # fmt: skip


def recall(index: GradientIndex, queries: np.ndarray, truth: np.ndarray) -> float:
    positions = index.search(queries, 10).lists.positions.reshape(len(queries), 10)
    return round(float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(positions, truth, strict=True)])), 4)


def row_duplicates(pool: np.ndarray, queries: np.ndarray, names: list[str], truth: np.ndarray) -> dict[str, Any]:
    """Planted pairs at all similarities above the threshold, one per hundred vectors."""
    rng = np.random.default_rng(2)
    originals, copies = rng.choice(len(pool), (2, len(pool) // 100), replace=False)
    planted = pool.copy()
    planted[copies] = near(pool[originals], rng)
    index = GradientIndex.from_vectors(names, planted, kind="flat")
    cpu, (seconds, labels) = timed(lambda: timed(lambda: index.duplicates(THRESHOLD)), time.process_time)
    return {
        "s": round(seconds, 1), "cpu s": round(cpu, 1), "planted pairs": len(copies), "found": int((labels[originals] == labels[copies]).sum()),
        "clusters": int((np.bincount(labels) > 1).sum()), "threshold": THRESHOLD,
    }  # fmt: skip


def row_templates(pool: np.ndarray, queries: np.ndarray, names: list[str], truth: np.ndarray) -> dict[str, Any]:
    """A pool of which a fifth are near-copies of ten templates: about two billion pairs, and ten clusters."""
    rng = np.random.default_rng(3)
    heavy = pool[: max(1000, len(pool) // 5)].copy()
    copies = rng.choice(len(heavy), len(heavy) // 5, replace=False)
    template = np.arange(len(copies)) % 10
    heavy[copies] = near(pool[-10:][template], rng, closest=0.3)
    index = GradientIndex.from_vectors(names[: len(heavy)], heavy, kind="flat")
    seconds, labels = timed(lambda: index.duplicates(THRESHOLD))
    found = all(len(np.unique(labels[copies[template == t]])) == 1 for t in range(10))
    return {"s": round(seconds, 1), "vectors": len(heavy), "copies": len(copies), "each template one cluster": found}


def near(vectors: np.ndarray, rng: np.random.Generator, closest: float = 0.999) -> np.ndarray:
    """Unit vectors whose cosine with the given ones is above the threshold, out to the given share of the way there."""
    noise = rng.standard_normal(vectors.shape).astype(np.float32)
    noise -= np.einsum("nd,nd->n", noise, vectors)[:, None] * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    angle = np.arccos(THRESHOLD) * closest * rng.uniform(0, 1, (len(vectors), 1)).astype(np.float32)
    return (np.cos(angle) * vectors + np.sin(angle) * noise).astype(np.float32)


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": row_plain,
    "shortlist": row_shortlist,
    **{kind: lambda *data, kind=kind: row_kind(kind, *data) for kind in KINDS},
    "duplicates": row_duplicates,
    "templates": row_templates,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    pool, queries = draw(arguments.count, 0), draw(BATCH, 1)
    names = [f"sample-{i:08d}" for i in range(arguments.count)]
    truth = FaissFlat(pool).candidates(queries, 10).positions
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "data": f"{arguments.count} x {DIMENSIONS}, {CLUSTERS} clusters, decay {DECAY}, {BATCH} queries",
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {os.environ['OMP_NUM_THREADS']} threads",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "faiss-cpu")},
        },
        "rows": {},
    }
    for name in arguments.rows:
        loads = os.getloadavg()[0]
        record["rows"][name] = {**ROWS[name](pool, queries, names, truth), "load before": round(loads, 1)}
        print(f"{name}: " + "; ".join(f"{key} {value}" for key, value in record["rows"][name].items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"index_{record['date']}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))


def markdown(record: dict[str, Any]) -> str:
    """The record as a page: one list per row."""
    lines = [f"# Index, {record['date']}", "", f"{record['data']}. {record['hardware']}.", ""]
    lines.append(", ".join(f"{name} {number}" for name, number in record["versions"].items()) + ".")
    lines.append("`load before`: other work on the machine when the row began, in processes.")
    for name, values in record["rows"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in values.items()),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
