"""A report of many samples: how long, how much memory, how large a page.

    python benchmarks/report.py                  100,000 samples, 28 layers x 7 projections; with and without an index
    python benchmarks/report.py --samples 1000   a try, which writes no result

The command runs in a process of its own, so that its peak memory is its own. Spectra and texts are made up; results go to
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pyarrow as pa

RESULTS = Path(__file__).parent / "results"
SOURCES = ("code", "math", "chat", "science", "safety", "other")
LAYERS, SHARD_ROWS = 28, 8192
GOALS = {"seconds": 60.0, "peak_gb": 1.5, "page_mb": 5.0}


def make_store(folder: Path, n: int) -> None:
    """A feature store and its rows: effective rank grows with length, norms fall; one row in a hundred repeats another."""
    from selector.store import StoreWriter
    from selector.store.schema import Manifest
    from selector.store.writer import create
    from selector.types import MEASURES, PROJECTIONS, LayerSpec

    layers = tuple(
        LayerSpec(name=f"layers.{i}.{p}", layer=i, projection=p, in_features=64, out_features=64)
        for i in range(LAYERS)
        for p in PROJECTIONS
    )
    cost = {"finished": "2026-01-01T00:00:00+00:00", "samples": n, "tokens": 500 * n, "seconds": 1.0, "device_seconds": 1.0,
            "epoch_ratio": 0.7, "store_bytes": 1, "tokens_per_batch": 1, "processes": 1, "device": "none"}  # fmt: skip
    manifest = Manifest(
        identity={"model": "made up", "id_column": "id", "loss": "response"}, layers=layers, expected=n, cost=(cost,)
    )
    create(folder / "store", manifest)
    writer = StoreWriter(folder / "store", manifest)
    rng = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for first in range(0, n, SHARD_ROWS):
            rows = np.arange(first, min(first + SHARD_ROWS, n))
            n_loss = np.exp(rng.uniform(np.log(8), np.log(2048), len(rows))).astype(np.int32)
            n_tokens = n_loss + np.exp(rng.uniform(np.log(8), np.log(512), len(rows))).astype(np.int32)
            source = np.array(SOURCES, dtype=object)[rng.integers(6, size=len(rows))]
            own = rng.normal(size=(len(rows), 1), scale=0.2)
            known: dict[str, Any] = {
                "sample_id": [f"sample-{i:08d}" for i in rows], "row": rows, "source": source, "n_tokens": n_tokens, "n_loss_tokens": n_loss,
                "truncated": rng.random(len(rows)) < 0.01, "status": np.where(rng.random(len(rows)) < 0.01, "too_long", "ok").tolist(),
                "loss": rng.gamma(4, 0.5, len(rows)).astype(np.float32),
            }  # fmt: skip
            for sign, name in zip((0.7, -0.5, -0.6, -0.6), MEASURES, strict=True):
                noise = own + rng.normal(size=(len(rows), len(layers)), scale=0.2)
                values = (n_tokens[:, None] ** sign * np.exp(noise)).astype(np.float32)
                values[1::100] = values[0::100][: len(values[1::100])]  # near-duplicates
                known[name] = list(values)
            columns = [
                pa.array(known[f.name], f.type) if f.name in known else pa.nulls(len(rows), f.type)
                for f in writer.schema
            ]
            writer.write(pa.Table.from_arrays(columns, schema=writer.schema))
            for i, name in zip(rows.tolist(), source.tolist(), strict=True):
                file.write(
                    json.dumps(
                        {
                            "id": f"sample-{i:08d}",
                            "source": name,
                            "prompt": f"question {i} " * 20,
                            "completion": f"answer {i} " * 40,
                        }
                    )
                    + "\n"
                )


def run(*words: str | Path) -> dict[str, float]:
    """Run a command of the program; its seconds and peak memory, interpreter and imports included."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "selector", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} has failed")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ['OMP_NUM_THREADS']} threads",
        "samples": arguments.samples,
        "layers x projections": f"{LAYERS} x 7",
        "goals": GOALS,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pyarrow", "jinja2", "faiss-cpu")},
        },
        "rows": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, arguments.samples)
        run("select", folder / "store", "--out", folder / "selection")
        run("index", folder / "store", "--out", folder / "index")
        words = (
            "report",
            folder / "store",
            folder / "selection",
            "--data",
            folder / "rows.jsonl",
            "--out",
            folder / "report.html",
        )
        for row, more in (("without index", ()), ("with index", ("--index", folder / "index"))):
            load = round(os.getloadavg()[0], 1)
            found = run(*words, *more) | {"page_mb": round((folder / "report.html").stat().st_size / 1e6, 2)}
            reached = all(found[goal] <= most for goal, most in GOALS.items())
            record["rows"][row] = found | {"reached": reached, "load before": load}
            print(f"{row}: {record['rows'][row]}", flush=True)
    if arguments.samples == 100_000:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"report_{record['date']}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
