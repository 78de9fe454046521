"""Many short runs over several processes and GPUs: every finished run is a line of JSON, and is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""What tells a run from the others: plain values by name."""

GRACE = 30
"""Seconds that a worker may take beyond its time before it is ended."""


def key_of(run: Run) -> str:
    """A run's settings as text."""
    return json.dumps(run, sort_keys=True)


def finished(folder: Path, name: str) -> list[dict[str, Any]]:
    """Results of all processes, each with its run under `run`.

    A line that a killed process left unfinished is passed over.

    Args:
        folder: where they are.
        name: kind of run.
    """
    results = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue
            results[key_of(result["run"])] = result
    return list(results.values())


def work(
    folder: Path,
    name: str,
    runs: Iterable[Run],
    do: Callable[[Run], dict[str, Any]],
    shard: tuple[int, int],
    deadline: float,
) -> int:
    """Do one process's share of the runs, in order.

    Args:
        folder: where results go.
        name: kind of run.
        runs: all of them, the most important first.
        do: gives a run's result.
        shard: number of the process, from 0, and of processes.
        deadline: on the monotonic clock; no run begins that, taking as long as the longest so far, would end later.

    Returns:
        How many were finished.
    """
    longest, count = 0.0, 0
    number, processes = shard
    done = {key_of(result["run"]) for result in finished(folder, name)}
    # every process shares out the whole list: what others finish meanwhile must not shift the shares
    left = [run for run in list(runs)[number::processes] if key_of(run) not in done]
    path = folder / f"{name}-{number}.jsonl"
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" if cut else "")
        for run in left:
            began = time.monotonic()
            if began + longest > deadline:
                break
            result = {"run": run, **do(run), "seconds": round(time.monotonic() - began, 2)}
            file.write(json.dumps(result) + "\n")
            file.flush()
            longest = max(longest, time.monotonic() - began)
            count += 1
    return count


def launch(script: Path, arguments: Sequence[str], folder: Path, workers: int, gpus: int, seconds: float) -> int:
    """Run a script in several processes, each with its shard.

    Args:
        script: takes `--shard i/n` and `--seconds`.
        arguments: others.
        folder: where the output of each process goes.
        workers: processes on each GPU, or in all without one.
        gpus: how many.
        seconds: that the processes may take.

    Returns:
        How many failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started, count = time.monotonic(), workers * max(gpus, 1)
    processes = []
    for i in range(count):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(i % gpus)
        command = [sys.executable, str(script), *arguments, "--shard", f"{i}/{count}", "--seconds", str(seconds)]
        with (folder / f"worker-{i}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    failed = 0
    for i, process in enumerate(processes):
        try:
            code = process.wait(max(1.0, seconds + GRACE - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            failed += 1
            print(f"worker {i} ended with {code}: {folder / f'worker-{i}.log'}", file=sys.stderr)
    return failed
