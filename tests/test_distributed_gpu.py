"""Accelerate's own sharding, as `accelerate launch` starts it, on two GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selector.assets import POOL, TINY_MODEL
from selector.store import FeatureStore
from selector.types import MEASURES

ROOT = Path(__file__).resolve().parent.parent
FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
ZERO = ("--use_deepspeed", "--zero_stage", "3", "--gradient_accumulation_steps", "1")
has_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def launch(out: Path, processes: int, *options: str) -> FeatureStore:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    several = ["--multi_gpu"] if processes > 1 and not options else []
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *several, *options]
    command += [
        "-m",
        "selector",
        "score",
        "--model",
        str(TINY_MODEL),
        "--data",
        str(POOL),
        "--dtype",
        "float32",
        "--limit",
        "41",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return FeatureStore.open(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> FeatureStore:
    return launch(tmp_path_factory.mktemp("alone") / "store", 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "options", [(), FSDP, pytest.param(ZERO, marks=has_deepspeed)], ids=["data-parallel", "fsdp2", "zero-3"]
)
def test_every_way_of_launching_gives_the_same_store(alone, tmp_path, options):
    store = launch(tmp_path / "store", 2, *options)
    assert store.verify() == []
    assert store.ids.tolist() == alone.ids.tolist()
    assert store.manifest.fingerprint == alone.manifest.fingerprint
    for measure in MEASURES:
        np.testing.assert_allclose(store.features(measure), alone.features(measure), rtol=1e-5)
