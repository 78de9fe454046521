"""Several processes, one store: equal numbers to one process, sharded models, nodes without a shared file system, failures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from accelerate import PartialState

from selector.cli import main
from selector.config import ScoreConfig
from selector.errors import SelectorError
from selector.forward import scorers
from selector.scorer import processes, score_dataset
from selector.store import FeatureStore
from selector.store.merge import merge
from selector.types import MEASURES

ROOT = Path(__file__).resolve().parent.parent
ROWS = 13
SCORERS = ("spectra", *scorers)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1",
}  # fmt: skip

PACE = """
import time

from selector.scorer import run
from selector.scorer.processes import turns

def paced(state):
    # every process gets a batch before any gets a second, and process 1 is slow
    numbers = turns(state)
    number = next(numbers)
    state.wait_for_everyone()
    while True:
        yield number
        time.sleep(0.5 * (state.process_index == 1))
        number = next(numbers)

run.turns = paced
"""

COMMAND = """
import json, sys
from itertools import takewhile
from pathlib import Path

import pace
from selector.cli import main
from selector.scorer.processes import process_state, turns

state = process_state()
drawn = list(takewhile(lambda number: number < 1000, turns(state)))
Path(sys.argv[1], f"drawn{state.process_index}.json").write_text(json.dumps(drawn))
sys.exit(main(sys.argv[2:]))
"""

WORKER = """
import json, sys
from pathlib import Path

import datasets, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaForCausalLM

import pace
from selector import ScoreConfig, score_dataset
from selector.assets import POOL, TINY_MODEL
from selector.data.samples import Encoder
from selector.scorer import backends
from selector.errors import SelectorError
from selector.scorer.features import FeatureExtractor
from selector.scorer.processes import process_state

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
state = process_state()
rank = state.process_index
tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
data = datasets.Dataset.from_json(str(POOL)).select(range(int(sys.argv[2])))
config = ScoreConfig(shard_rows=3, tokens_per_batch=300, sketch_dimension=4, scorers=tuple(sys.argv[3:]))
model = LlamaForCausalLM.from_pretrained(folder / "model")

score_dataset(model, tokenizer, data, folder / "shared", config)

# two nodes that do not see each other's files
state._shared_state["local_process_index"] = 0
score_dataset(model, tokenizer, data, folder / f"node{rank}" / "store", config)
state._shared_state["local_process_index"] = rank

# one process fails in its first batch, which comes after three of the self-test
original = FeatureExtractor.__call__
calls = []

def failing(self, batch):
    calls.append(batch)
    if rank == 1 and len(calls) == 4:
        raise RuntimeError("the device fell off the bus")
    return original(self, batch)

def note_failure(store):
    try:
        score_dataset(model, tokenizer, data, folder / store, config)
        message = "no failure"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    (folder / f"{store}{rank}.json").write_text(json.dumps(message))

FeatureExtractor.__call__ = failing
note_failure("failing")
FeatureExtractor.__call__ = original

# one process fails while it tokenizes its part
tokenize = Encoder.encode

def refusing(self, rows, ids, sources, first=0):
    if first > 0:
        raise RuntimeError("the tokenizer choked")
    return tokenize(self, rows, ids, sources, first)

Encoder.encode = refusing
note_failure("choking")
Encoder.encode = tokenize

# a sharded model: one rank has fewer batches than the other, and both must run it equally often. As Accelerate makes it, the last norm
# is part of a unit that gathers its weights when it is called; norms are replaced as on a GPU.
mesh = init_device_mesh("cpu", (2,))
for unit in (*model.model.layers, [model.model.embed_tokens, model.model.norm, model.lm_head]):
    fully_shard(unit, mesh=mesh)
fully_shard(model, mesh=mesh)
backends.fuses = lambda device: True
score_dataset(model, tokenizer, data, folder / "sharded", config)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """What two processes have left, run once for all tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    for name, script in {"pace": PACE, "command": COMMAND, "worker": WORKER}.items():
        (path / f"{name}.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(path / "worker.py"), str(path), str(ROWS), *SCORERS],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def alone(folder, tokenizer, pool) -> FeatureStore:
    """The same rows, scored by one process."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model")
    config = ScoreConfig(tokens_per_batch=4096, sketch_dimension=4, scorers=SCORERS)
    return score_dataset(model, tokenizer, pool.select(range(ROWS)), folder / "alone", config)


def assert_equal(found: FeatureStore, expected: FeatureStore) -> None:
    assert found.verify() == []
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.manifest.fingerprint == expected.manifest.fingerprint
    for measure in MEASURES:
        np.testing.assert_allclose(found.features(measure), expected.features(measure), rtol=1e-5)
    for name in scorers:
        one, other = (store.to_arrow([name])[name].to_numpy() for store in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(
        found.sketches(), expected.sketches(), rtol=2e-3, atol=1e-3 * np.abs(expected.sketches()).max()
    )


def rows_by_rank(store: FeatureStore) -> Counter[str]:
    """Rows in the shards of each process."""
    rows: Counter[str] = Counter()
    for path, table in zip(store.shard_paths(), store.shards(["row"]), strict=True):
        rows[path.name.split("-")[0]] += table.num_rows
    return rows


def test_two_processes_give_the_store_of_one(folder, alone):
    store = FeatureStore.open(folder / "shared")
    assert_equal(store, alone)
    rows = rows_by_rank(store)
    assert sum(rows.values()) == ROWS
    assert rows["00000"] > rows["00001"] > 0, "the slow process takes fewer batches"
    (entry,) = store.manifest.cost
    assert entry["processes"] == 2
    assert entry["device_seconds"] == pytest.approx(2 * entry["seconds"], abs=0.01)


def test_sharded_model_gives_the_store_and_fingerprint_of_the_whole_one(folder, alone):
    store = FeatureStore.open(folder / "sharded")
    assert_equal(store, alone)
    assert store.manifest.cost[-1]["tokens_per_batch"] == 300


def test_nodes_without_a_shared_file_system_keep_parts_that_merge(folder, alone, tmp_path):
    parts = [folder / f"node{rank}" / "store" for rank in range(2)]
    assert [len(FeatureStore.open(part).shard_paths()) > 0 for part in parts] == [True, True]
    assert sum(len(FeatureStore.open(part)) for part in parts) == ROWS
    joined = merge(parts, tmp_path / "joined")
    assert_equal(joined, alone)
    assert len(joined.manifest.cost) == 1


def test_failure_of_one_process_is_told_by_all_and_loses_no_finished_shard(folder, alone, tokenizer, pool):
    messages = [json.loads((folder / f"failing{rank}.json").read_text()) for rank in range(2)]
    assert messages[0].startswith("SelectorError: process 1 of 2 has failed")
    assert "fell off the bus" in messages[0]
    assert messages[1] == "RuntimeError: the device fell off the bus"
    from transformers import LlamaForCausalLM

    broken = FeatureStore.open(folder / "failing")
    done = len(broken)
    assert 0 < done < ROWS
    assert set(rows_by_rank(broken)) == {"00000"}, "the other process has done the rest"
    # begun on two processes, finished on one
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    finished = score_dataset(
        model, tokenizer, pool.select(range(ROWS)), folder / "failing", ScoreConfig(sketch_dimension=4, scorers=SCORERS)
    )
    assert_equal(finished, alone)
    assert finished.manifest.cost[-1]["samples"] == ROWS - done


def test_failure_of_one_process_in_its_part_of_the_tokenizing_is_told_by_all(folder):
    messages = [json.loads((folder / f"choking{rank}.json").read_text()) for rank in range(2)]
    assert messages[0].startswith("SelectorError: process 1 of 2 has failed")
    assert messages[1] == "RuntimeError: the tokenizer choked"
    assert not (folder / "choking").exists()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "PartialState", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(SelectorError, match="do not know of each other"):
        processes.process_state()


def test_processes_that_nothing_counts_for_are_refused(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SelectorError, match="no server"):
        processes.turns(Mock(spec=PartialState, num_processes=2))


def by_torchrun(node: int, processes: int, port: int) -> list[str]:
    where = ["--rdzv_backend", "c10d", "--rdzv_id", "7", "--rdzv_endpoint", f"localhost:{port}"]
    return [
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node_rank",
        str(node),
        "--nproc_per_node",
        str(processes),
        *where,
    ]


def by_accelerate(node: int, processes: int, port: int) -> list[str]:
    """Also without GPUs the launcher calls several processes on several machines so."""
    machines = ["--num_machines", "2", "--machine_rank", str(node), "--num_processes", str(2 * processes)]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_backend", "static"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["accelerate.commands.launch", "--multi_gpu", *machines, *where, *settings]


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [(by_torchrun, (2, 1)), pytest.param(by_accelerate, (1, 1), marks=pytest.mark.slow)],
    ids=["torchrun", "accelerate"],
)
def test_command_line_on_two_nodes_and_merge(folder, alone, pool, tmp_path, capsys, launcher, processes):
    """Each node has its own directory; what the nodes keep is verified, joined, and finished where a part was lost."""
    port, rows = free_port(), tmp_path / "rows.jsonl"
    pool.select(range(ROWS)).to_json(rows)
    command = [
        "score", "--model", str(folder / "model"), "--data", str(rows), "--with", *SCORERS,
        "--shard-rows", "3", "--tokens-per-batch", "300", "--sketch-dimension", "4", "--out",
    ]  # fmt: skip
    nodes = [tmp_path / f"node{i}" / "features" for i in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *launcher(i, count, port), str(folder / "command.py"), str(tmp_path), *command, str(nodes[i])],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i, count in enumerate(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said

    parts = [FeatureStore.open(node) for node in nodes]
    ranks = [rows_by_rank(part) for part in parts]
    assert sorted(map(len, ranks)) == sorted(processes)
    assert ranks[0].keys().isdisjoint(ranks[1])
    assert sum(rows.total() for rows in ranks) == ROWS
    drawn = [json.loads((tmp_path / f"drawn{rank}.json").read_text()) for rank in range(sum(processes))]
    assert sorted(chain.from_iterable(drawn)) == list(range(1000)), "each number goes to one process"
    assert all(numbers == sorted(numbers) for numbers in drawn)
    for node in nodes:  # sound as far as it goes, but a part of the whole
        assert main(["verify", str(node)]) == 1
        assert capsys.readouterr().err.count("error:") == 1

    joined, partly = tmp_path / "joined", tmp_path / "partly"
    assert main(["merge", *map(str, nodes), "--out", str(joined)]) == 0
    assert main(["verify", str(joined)]) == 0
    assert f"{ROWS} samples, all that the data set has" in capsys.readouterr().out
    assert_equal(FeatureStore.open(joined), alone)

    lost = next(iter(parts[1].shard_paths()))
    lost.unlink()
    assert main(["merge", *map(str, nodes), "--out", str(partly)]) == 0
    assert "are missing" in capsys.readouterr().out
    assert main([*command, str(partly)]) == 0
    assert main(["verify", str(partly)]) == 0
    assert_equal(FeatureStore.open(partly), alone)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
