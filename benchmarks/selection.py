"""Selection at scale: how long, how much memory, and against which plain way.

    python benchmarks/selection.py                  all rows, as reported (about five minutes, 2 GB of disk)
    python benchmarks/selection.py table features   some rows

Each row runs in a process of its own, so that its peak memory is its own. Results go to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results"
SOURCES = ("code", "math", "chat", "science", "safety", "other")
SHARES = {"code": 0.3, "math": 0.3, "chat": 0.2, "science": 0.1, "safety": 0.05, "other": 0.05}


CPU = {"seconds": 0.0}
"""CPU seconds of all threads in what was timed: on a machine that others load, wall-clock time is theirs too."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of some work, and its result."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    CPU["seconds"] += time.process_time() - cpu
    return time.perf_counter() - start, result


def make_table(path: Path, n: int) -> None:
    """A table of scores of n rows: six uneven sources, log-uniform lengths, ids that are not in order."""
    from selector.scores import write_scores
    from selector.types import Scores

    rng = np.random.default_rng(0)
    n_tokens = np.exp(rng.uniform(np.log(16), np.log(4096), n)).astype(np.int32)
    values = rng.normal(size=n)
    values[rng.random(n) < 0.01] = np.nan
    numbers = pa.array(rng.permutation(n)).cast(pa.string())
    ids = pc.binary_join_element_wise("sample", pc.utf8_lpad(numbers, 8, "0"), "-")  # pyright: ignore[reportAttributeAccessIssue]
    source = np.array(SOURCES, dtype=object)[rng.choice(6, n, p=[0.1, 0.15, 0.5, 0.05, 0.05, 0.15])]
    scores = Scores(
        ids.to_numpy(zero_copy_only=False), np.arange(n), values, np.exp(values), n_tokens, n_tokens // 2, source
    )
    write_scores(path, {"effective_rank": scores})


def row_table(folder: Path, n: int) -> dict[str, Any]:
    """Quotas per source and a token budget on a table of scores."""
    from selector.selecting import select

    path = folder / "scores.parquet"
    seconds, selection = timed(lambda: select(path, "effective_rank", "10% tokens", "quota", shares=SHARES))
    spent = {s: c["picked_tokens"] for s, c in selection.provenance["sources"].items()}
    total = sum(c["tokens"] for c in selection.provenance["sources"].values())
    detail = {"rows": n, "picked": len(selection), "share of tokens": sum(spent.values()) / total}
    return {"seconds": seconds, "goal": "<= 5 s, <= 1 GB", "reached": seconds <= 5, **detail}


def row_table_top(folder: Path, n: int) -> dict[str, Any]:
    """The highest tenth of a table of scores."""
    from selector.selecting import select

    seconds, selection = timed(lambda: select(folder / "scores.parquet", "effective_rank", "10%"))
    return {"seconds": seconds, "goal": "<= 5 s, <= 1 GB", "reached": seconds <= 5, "rows": n, "picked": len(selection)}


def row_table_pandas(folder: Path, n: int) -> dict[str, Any]:
    """The plain way to the same quotas: pandas, the whole table in memory, ids included."""
    import pandas as pd

    def work() -> int:
        frame = pd.read_parquet(
            folder / "scores.parquet", columns=["sample_id", "source", "n_tokens", "effective_rank"]
        )
        frame = frame.dropna(subset=["effective_rank"])
        limit, picked = 0.1 * frame["n_tokens"].sum(), 0
        for name, share in SHARES.items():
            part = frame.loc[frame["source"] == name]
            part = part.sort_values("sample_id").sort_values("effective_rank", ascending=False, kind="stable")
            picked += int(np.sum(part["n_tokens"].to_numpy().cumsum() <= share * limit))
        return picked

    seconds, picked = timed(work)
    return {"seconds": seconds, "goal": "", "reached": None, "rows": n, "picked": picked}


def make_store(folder: Path, n: int, shard_rows: int = 8192) -> None:
    """A feature store of n rows and 16 layers x 7 projections, of which only one measure differs from row to row."""
    from selector.store import StoreWriter
    from selector.store.schema import Manifest
    from selector.store.writer import create
    from selector.types import MEASURES, PROJECTIONS, LayerSpec

    layers = tuple(
        LayerSpec(name=f"layers.{i}.{p}", layer=i, projection=p, in_features=64, out_features=64)
        for i in range(16)
        for p in PROJECTIONS
    )
    manifest = Manifest(identity={"model": "made up"}, layers=layers, expected=n)
    create(folder, manifest)
    writer = StoreWriter(folder, manifest)
    rng = np.random.default_rng(0)
    for first in range(0, n, shard_rows):
        rows = np.arange(first, min(first + shard_rows, n))
        n_loss = np.exp(rng.uniform(np.log(8), np.log(1024), len(rows))).astype(np.int32)
        n_tokens = n_loss + np.exp(rng.uniform(np.log(8), np.log(512), len(rows))).astype(np.int32)
        ranks = n_tokens[:, None] ** 0.7 * np.exp(rng.normal(size=(len(rows), len(layers)), scale=0.2))
        known = {
            "sample_id": [f"sample-{i:08d}" for i in rows],
            "row": rows,
            "source": np.array(SOURCES, dtype=object)[rows % 6],
            "n_tokens": n_tokens,
            "n_loss_tokens": n_loss,
            "truncated": np.zeros(len(rows), dtype=bool),
            "status": ["ok"] * len(rows),
            "loss": np.ones(len(rows), dtype=np.float32),
            **{
                name: list((ranks if name == "effective_rank" else np.ones_like(ranks)).astype(np.float32))
                for name in MEASURES
            },
        }
        columns = [
            pa.array(known[f.name], f.type) if f.name in known else pa.nulls(len(rows), f.type) for f in writer.schema
        ]
        writer.write(pa.Table.from_arrays(columns, schema=writer.schema))


def row_features(folder: Path, n: int) -> dict[str, Any]:
    """Features of a store to a table of raw and length-controlled scores."""
    from selector.scores import length_correlation, score, write_scores
    from selector.store import FeatureStore

    def work() -> Any:
        scores = score(FeatureStore.open(folder / "store"))
        write_scores(folder / "from_store.parquet", {"effective_rank": scores})
        return scores

    seconds, scores = timed(work)
    found = length_correlation(scores)
    detail = {"rows": n, "features": 112, "Spearman with length, raw": found.raw, "controlled": found.controlled}
    return {"seconds": seconds, "goal": "<= 3 s, <= 1 GB", "reached": seconds <= 3, **detail}


def row_features_numpy(folder: Path, n: int) -> dict[str, Any]:
    """The plain way to the raw scores: every shard as Python lists of rows, one NumPy array per row."""
    shards = sorted((folder / "store" / "shards").glob("*.parquet"))[:8]

    def work() -> int:
        rows = 0
        for path in shards:
            lists = pq.read_table(path, columns=["effective_rank"])["effective_rank"].to_pylist()
            rows += len([float(np.exp(np.mean(np.log(np.array(one))))) for one in lists])
        return rows

    seconds, rows = timed(work)
    return {"seconds": seconds * n / rows, "goal": "", "reached": None, "rows": n, "measured on": rows}


def clustered(n: int, d: int = 128, clusters: int = 2000, seed: int = 0) -> np.ndarray:
    """Vectors around centers, with a spectrum that decays as 1 / sqrt(rank)."""
    rng = np.random.default_rng(seed)
    scale = (np.arange(1, d + 1) ** -0.5).astype(np.float32)
    centers = rng.normal(size=(clusters, d)).astype(np.float32)
    noise = rng.normal(size=(n, d)).astype(np.float32)
    return (centers[rng.integers(0, clusters, n)] + 0.5 * noise) * scale


def row_facility(folder: Path, n: int, picks: int = 10_000) -> dict[str, Any]:
    """Facility location, the graph included, on an index that is built already."""
    from selector.index import GradientIndex
    from selector.selecting import select
    from selector.testing import make_pool

    scores = make_pool(n)
    vectors = clustered(n)
    built, index = timed(lambda: GradientIndex.from_vectors(scores.ids, vectors))
    seconds, selection = timed(lambda: select(scores, budget=picks, policy="facility-location", index=index, k=16))
    detail = {"rows": n, "picked": len(selection), "index built in": built, "index": index.description}
    return {"seconds": seconds + built, "goal": "<= 45 s, graph included", "reached": seconds + built <= 45, **detail}


def row_facility_value(folder: Path, n: int, picks: int = 250) -> dict[str, Any]:
    """Value of facility location on a sparse graph against exact lazy greedy over all pairs."""
    from selector.index import GradientIndex
    from selector.selecting import select
    from selector.testing import make_pool

    scores = make_pool(n)
    vectors = clustered(n, clusters=n // 100)
    index = GradientIndex.from_vectors(scores.ids, vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = (unit @ unit.T).astype(np.float64)
    place = {sample_id: i for i, sample_id in enumerate(scores.ids)}

    def value(k: int) -> tuple[float, float]:
        seconds, selection = timed(lambda: select(scores, budget=picks, policy="facility-location", index=index, k=k))
        return seconds, float(similarity[:, [place[i] for i in selection.ids]].max(axis=1).sum())

    exact_seconds, exact = value(n - 1)
    ratios = {f"value at k={k}": value(k)[1] / exact for k in (8, 16, 32, 64)}
    return {
        "seconds": exact_seconds,
        "goal": ">= 0.99 of exact",
        "reached": ratios["value at k=16"] >= 0.99,
        "rows": n,
        "picked": picks,
        **ratios,
    }


ROWS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    "table, quotas and token budget": (row_table, 10_000_000),
    "table, top": (row_table_top, 10_000_000),
    "table, quotas in pandas": (row_table_pandas, 10_000_000),
    "features to scores": (row_features, 1_000_000),
    "features to scores, row by row": (row_features_numpy, 1_000_000),
    "facility location": (row_facility, 200_000),
    "facility location, value": (row_facility_value, 5_000),
}


def in_child(work: Callable[[Path, int], dict[str, Any]], folder: Path, n: int, queue: Any) -> None:
    """Run one row and report its result with the peak memory of this process."""
    result = {**work(folder, n), "CPU seconds": CPU["seconds"], "load": os.getloadavg()[0]}
    # the high-water mark of this process alone; what getrusage tells is inherited from the parent
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    queue.put({**result, "peak GB": int(line.split()[1]) / 1e6})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="only rows whose name holds one of these words")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of rows, for a quick look")
    arguments = parser.parse_args()
    names = [name for name in ROWS if not arguments.rows or any(word in name for word in arguments.rows)]
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith("table") for name in names):
            make_table(Path(folder) / "scores.parquet", int(1e7 * arguments.scale))
        if any(name.startswith("features") for name in names):
            make_store(Path(folder) / "store", int(1e6 * arguments.scale))
        for name in names:
            work, n = ROWS[name]
            queue = spawn.Queue()
            child = spawn.Process(target=in_child, args=(work, Path(folder), int(n * arguments.scale), queue))
            child.start()
            results[name] = queue.get()
            child.join()
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    if arguments.scale == 1.0:
        write(results)


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the results as JSON and as a table to read."""
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "pyarrow", "faiss-cpu")},
    }
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"selection_{about['date']}"
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    lines = [f"# Selection at scale, {about['date']}", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += [
        "| what | seconds | CPU seconds | load | peak GB | goal | reached | details |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        reached = {True: "yes", False: "no", None: ""}[result["reached"]]
        rest = {
            k: v for k, v in result.items() if k not in ("seconds", "CPU seconds", "load", "peak GB", "goal", "reached")
        }
        details = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
        cells = [f"{result[key]:.2f}" for key in ("seconds", "CPU seconds", "load", "peak GB")]
        lines.append(f"| {' | '.join([name, *cells, result['goal'], reached, details])} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"written to {stem}.json and .md")


if __name__ == "__main__":
    main()
