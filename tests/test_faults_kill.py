"""SIGKILL at any moment, on changing numbers of processes: a small version of benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_killed_runs_end_in_the_store_of_an_unbroken_run(tmp_path):
    command = [
        sys.executable,
        "benchmarks/faults.py",
        "--kills",
        "3",
        "--samples",
        "40",
        "--longest",
        "2",
        "--results",
        str(tmp_path),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = tmp_path.glob("faults-*.json")
    report = json.loads(result.read_text())
    assert report["kills"] == 3
    assert report["damages beyond unfinished and temporary"] == {}
    assert report["passed"]
