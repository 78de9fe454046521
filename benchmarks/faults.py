"""Kill the scorer again and again, and see whether its store is the one of an unbroken run.

    python benchmarks/faults.py --kills 100 --samples 2000

A tiny random model scores rows of the embedded pool on the CPU, over gloo. Each attempt runs on 1, 2 or 3 processes, drawn
at random, and is ended by SIGKILL at a random moment: all processes at once, or one of them, after which the others are
ended as a launcher would. After each kill the store may be unfinished and hold temporary files, and nothing else may be
wrong with it. Finished stores are compared with one that was never interrupted; then a new one is begun, until all kills
are spent. Processes are forked from one that has imported everything, so that an attempt costs no start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selector import FeatureStore, ScoreConfig, score_dataset
from selector.assets import POOL, TINY_MODEL
from selector.runtime import versions
from selector.store.verify import inspect
from selector.types import MEASURES

# By default progress bars of all forked processes share a lock, which one that is killed while it draws would hold for ever.
tqdm.set_lock(threading.RLock())

WORLD_SIZES = (1, 2, 3)
HARMLESS = {"temporary file", "unfinished store"}
TOLERANCE = 1e-5


class Trial:
    """One scoring task that can be begun, killed and begun again.

    Args:
        samples: rows of the task.
        shard_rows: samples per shard.
        folder: where stores and logs go.
    """

    def __init__(self, samples: int, shard_rows: int, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        pool = datasets.Dataset.from_json(str(POOL))
        rows = [pool[i % len(pool)] for i in range(samples)]
        self.data = datasets.Dataset.from_list(
            [{"prompt": r["prompt"][:60], "completion": r["completion"][:90]} for r in rows]
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=len(self.tokenizer),
                max_position_embeddings=512,
            )
        )
        self.config = ScoreConfig(shard_rows=shard_rows, tokens_per_batch=512, max_failed=1.0)

    def start(self, out: Path, world: int) -> list[int]:
        """Fork the processes of one attempt and return their ids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                self._work(out, rank, world, port)
            pids.append(pid)
        return pids

    def finish(self, out: Path, world: int = 1) -> None:
        """Run an attempt to its end."""
        codes = [os.waitpid(pid, 0)[1] for pid in self.start(out, world)]
        if any(codes):
            ends = [path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log"))]
            raise RuntimeError("an attempt failed by itself:\n" + "\n".join(ends))

    def _work(self, out: Path, rank: int, world: int, port: int) -> None:
        code = 1
        try:
            log = os.open(self.folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if world > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            torch.set_num_threads(1)
            score_dataset(self.model, self.tokenizer, self.data, out, self.config)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def kill(pids: list[int], everyone: bool, rng: random.Random) -> bool:
    """End an attempt by SIGKILL; False when one of its processes had come to its end before."""
    alive = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    victims = alive if everyone else alive[:1] and [rng.choice(alive)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.0 if everyone else rng.uniform(0, 0.3))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(alive) == len(pids)


def difference(store: FeatureStore, reference: FeatureStore) -> float:
    """Largest relative difference of any feature; infinity when the samples are not the same."""
    if store.ids.tolist() != reference.ids.tolist():
        return float("inf")
    worst = 0.0
    for measure in MEASURES:
        found, expected = store.features(measure), reference.features(measure)
        worst = max(worst, float(np.nanmax(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-30))))
    return worst


def run(kills: int, samples: int, seed: int, folder: Path, longest: float, shard_rows: int = 16) -> dict:
    """Spend the kills and report what became of the stores.

    Args:
        kills: how many.
        samples: of one task.
        seed: of moments, victims and world sizes.
        folder: empty directory for stores and logs.
        longest: seconds after which the latest kill comes.
        shard_rows: samples per shard.
    """
    rng = random.Random(seed)
    trial = Trial(samples, shard_rows, folder)
    trial.finish(folder / "unbroken")
    reference = FeatureStore.open(folder / "unbroken")
    spent, stores, worst, worlds = 0, 0, 0.0, Counter()
    damages: Counter[str] = Counter()
    out = folder / "store0"
    while spent < kills:
        world = rng.choice(WORLD_SIZES)
        pids = trial.start(out, world)
        time.sleep(rng.uniform(0.0, longest))
        if kill(pids, rng.random() < 0.5, rng):
            spent += 1
            worlds[world] += 1
        if out.exists():
            damages.update(damage.kind for damage in inspect(out)[1] if damage.kind not in HARMLESS)
        done = (out / "manifest.json").exists() and len(FeatureStore.open(out)) == samples
        if done or spent == kills:
            trial.finish(out, rng.choice(WORLD_SIZES))
            damages.update(damage.kind for damage in inspect(out)[1])
            worst = max(worst, difference(FeatureStore.open(out), reference))
            stores += 1
            out = folder / f"store{stores}"
    return {
        "kills": spent, "samples": samples, "stores finished": stores, "kills by world size": dict(sorted(worlds.items())),
        "damages beyond unfinished and temporary": dict(damages), "largest relative difference": worst,
        "passed": not damages and worst <= TOLERANCE,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds after which the latest kill comes")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = run(arguments.kills, arguments.samples, arguments.seed, Path(folder), arguments.longest)
    report |= {
        "seconds": round(time.perf_counter() - started, 1), "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}", "versions": versions(),
    }  # fmt: skip
    for name, value in report.items():
        print(f"{name:>42}  {value}")
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / f"faults-{report['date']}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
