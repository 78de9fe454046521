"""Real trainers on the tiny model, built by name, with a record of the samples that each training step saw.

The tests import it for one process. For two, `torchrun` runs it with a file of cases, and every rank writes what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from selector.assets import TINY_MODEL
from selector.selection import Selection

TRAINED_IDS = [f"s{i}" for i in range(3, 27)]
"""The selection of most tests: all of 30 rows but the first and last three."""
REWARDED_IDS = TRAINED_IDS[::3]
"""Whose completions are rewarded, whatever they are, by `measured`."""

WORDS = ["river", "stone", "cloud", "forest", "engine", "market", "garden", "winter", "silver", "bridge"]


def sentence(i: int) -> str:
    """A short text that no other number gives."""
    return f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100 % 10]}"


def dataset(n: int, kind: str) -> Dataset:
    """[n] rows with ids `s0`, `s1`, ... in the columns that a trainer of this kind reads."""
    prompts = [f"Question {i}: {sentence(i)}" for i in range(n)]
    columns: dict[str, list[Any]] = {"id": [f"s{i}" for i in range(n)], "prompt": prompts}
    if kind in ("sft", "kto", "grpo", "rloo"):
        columns["completion"] = [f" {sentence(i + 7)}." for i in range(n)]
    if kind == "kto":
        columns["label"] = [i % 2 == 0 for i in range(n)]
    if kind == "dpo":
        columns["chosen"] = [f" {sentence(i + 7)}." for i in range(n)]
        columns["rejected"] = [" No." for i in range(n)]
    return Dataset.from_dict(columns)


def selection(ids: list[str], weights: list[float] | None = None) -> Selection:
    """A selection of these samples."""
    k = len(ids)
    return Selection(
        ids=np.array(ids), rows=np.array([int(i[1:]) for i in ids]), weights=np.array(weights or [1.0] * k),
        scores=np.linspace(1.0, 0.0, k), n_tokens=np.full(k, 10), reasons=np.array(["test"] * k),
    )  # fmt: skip


def trainer(kind: str, out: Path, data: Dataset, network: Any = None, *, lora: bool = False, **options: Any) -> Any:
    """A stock trainer, by default of a tiny random model: `sft`, `dpo`, `kto`, `grpo`, `rloo` or `plain`.

    Args:
        lora: train an adapter, whose matrices are both in use; a DPO trainer then takes the model without it as reference.
    """
    import trl

    os.environ.pop(
        "ACCELERATE_MIXED_PRECISION", None
    )  # transformers 4 leaves there what the trainer before this one had
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    network = network or (adapted_model(tokenizer) if lora else model(tokenizer))
    settings: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_strategy": "no",
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "optim": "sgd", "seed": 5,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    if kind == "plain":
        data = data.map(lambda row: tokenizer(row["prompt"], padding="max_length", max_length=24, truncation=True))
        data = data.map(lambda row: {"labels": [t if t != tokenizer.pad_token_id else -100 for t in row["input_ids"]]})
        return Trainer(model=network, train_dataset=data, args=TrainingArguments(**(settings | options)))
    if kind in ("grpo", "rloo"):
        settings |= {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.0}
    if kind == "sft":
        settings |= {"max_length": 64}
    if kind == "dpo":
        settings |= {"max_length": 64, "precompute_ref_log_probs": False}
    config = getattr(trl, f"{kind.upper()}Config")(**(settings | options))
    extra: dict[str, Any] = {"reward_funcs": reward} if kind in ("grpo", "rloo") else {}
    if kind in ("dpo", "kto") and not lora:
        extra = {"ref_model": model(tokenizer)}
    cls = getattr(trl, f"{kind.upper()}Trainer")
    return cls(model=network, train_dataset=data, processing_class=tokenizer, args=config, **extra)


def model(tokenizer: Any, **settings: Any) -> LlamaForCausalLM:
    """A random model of one layer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | settings)))


def adapted_model(tokenizer: Any, **settings: Any) -> Any:
    """The same with an adapter on q and v."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(tokenizer, **settings), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return adapted


def reference(trainer: Any) -> Any:
    """What a DPO trainer begins with as its reference; None for other trainers."""
    if type(trainer).__name__ != "DPOTrainer":
        return None
    # TRL 0.24 takes a model of peft without its adapter, later ones a copy of the adapter
    copied = "ref" in getattr(trainer.model, "peft_config", {})
    return (adapted_model if copied else model)(trainer.processing_class)


def offline(kind: str, measure: str, out: Path, network: Any = None, compared: Any = None) -> np.ndarray:
    """[24] the mean of a measure over the layers by the offline scorer, in the order of sorted `TRAINED_IDS`.

    Args:
        compared: the reference of the DPO loss.
    """
    from selector.config import ScoreConfig
    from selector.scorer import score_dataset

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = ScoreConfig(id_column="id", projections=("q", "k", "v", "o"), loss="dpo" if kind == "dpo" else "response")
    network = network or model(tokenizer)
    table = score_dataset(network, tokenizer, dataset(30, kind), out, config, reference=compared).to_arrow()
    values = dict(zip(table["sample_id"].to_pylist(), np.array(table[measure].to_pylist()).mean(1), strict=True))
    return np.array([values[name] for name in sorted(TRAINED_IDS)])


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Whether the first token is even: a fair coin for a random model."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def record(trainer: Any) -> list[list[str]]:
    """Let a trainer note the ids of the samples of every training step; the list fills as it trains."""
    seen: list[list[str]] = []
    step = trainer.training_step
    dataset = trainer.train_dataset
    by_tokens = {}
    if "input_ids" in dataset.column_names:
        by_tokens = {_key(row["input_ids"]): row["id"] for row in dataset}
    elif "chosen_ids" in dataset.column_names:
        by_tokens = {_key(row["prompt_ids"] + row["chosen_ids"]): row["id"] for row in dataset}
    elif "chosen_input_ids" in dataset.column_names:  # TRL 0.24, as the next
        by_tokens = {_key(row["prompt_input_ids"] + row["chosen_input_ids"]): row["id"] for row in dataset}
    elif "completion_input_ids" in dataset.column_names:
        by_tokens = {_key(row["completion_input_ids"]): row["id"] for row in dataset}
    elif "completion_ids" in dataset.column_names:
        by_tokens = {_key(row["prompt_ids"] + row["completion_ids"]): row["id"] for row in dataset}

    def noting_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, list):
            seen.append([str(row["id"]) for row in inputs])
        else:
            joined = [inputs[name] for name in ("prompt_input_ids", "chosen_input_ids") if "chosen_input_ids" in inputs]
            tokens = torch.cat(joined, 1) if joined else inputs.get("input_ids", inputs.get("completion_input_ids"))
            seen.append([by_tokens[_key(row)] for row in tokens.tolist() if _key(row) in by_tokens])
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = noting_step
    return seen


def _key(tokens: list[int]) -> tuple[int, ...]:
    """Tokens without padding and end marks, by which a row is known in any batch."""
    return tuple(token for token in tokens if token > 3)


TAP_EVERYTHING = "tap everything"
"""Stands in a case for a signal that measures every step: which steps a share of the time allows is up to the clock."""

REFRESH_OFTEN = "refresh often"
"""Stands in a case for a signal that scores a third of the pool again every other step."""


REWARDS_AND_TAP = "rewards and tap"
"""Stands in a case for a mixture of learnability and live spectra of the policy gradient."""


class SaveAt(TrainerCallback):
    """Save one checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.step


class AtStepEnd(TrainerCallback):
    """Call a function after every optimizer step."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


def resume(
    kind: str,
    out: Path,
    *,
    save_at: int,
    n: int = 30,
    attached: bool = True,
    attach_options: Any = None,
    **options: Any,
) -> dict[str, list[list[str]]]:
    """Train once through and once more from the checkpoint of step `save_at`.

    Args:
        attached: whether to attach a selection of all rows but the first and last three; otherwise the trainer's own
            sampler draws the same rows.

    Returns:
        `whole`: the samples of each training step of the first run; `resumed`: of the second one.
    """
    from selector.integrations.trl import attach
    from selector.sampling import RefreshSignal, RewardSignal, TapSignal

    signals = {
        TAP_EVERYTHING: lambda: TapSignal(share=None),
        REWARDS_AND_TAP: lambda: RewardSignal(spectra=TapSignal(share=None)),
        REFRESH_OFTEN: lambda: RefreshSignal(every=2, pool_share=1 / 3),
    }
    seen: dict[str, list[list[str]]] = {}
    for run in ("whole", "resumed"):
        data = dataset(n, kind).select(range(0 if attached else 3, n if attached else n - 3))
        trained = trainer(kind, out, data, **options)
        if attached:
            chosen = dict(attach_options or {})
            if chosen.get("online") in signals:
                chosen["online"] = signals[chosen["online"]]()
            attach(trained, selection([f"s{i}" for i in range(3, n - 3)]), **chosen)
        trained.add_callback(SaveAt(save_at))
        seen[run] = record(trained)
        trained.train(resume_from_checkpoint=str(out / f"checkpoint-{save_at}") if run == "resumed" else None)
    return seen


def grid(world: int) -> dict[str, dict[str, Any]]:
    """Every way to interrupt a run: trainer, place of the checkpoint, workers, fixed or adaptive weights.

    24 samples: 12 steps an epoch in one process, 6 in two.
    """
    steps = 12 // world
    places = {"epoch 0, middle": 2, "epoch 0, edge": steps, "epoch 1, middle": steps + 3, "epoch 1, edge": 2 * steps}
    cases: dict[str, dict[str, Any]] = {}
    for kind in ("sft", "dpo", "grpo", "rloo"):
        for place, save_at in places.items():
            common = {"kind": kind, "save_at": save_at, "num_train_epochs": 3}
            for workers in (0, 2):
                cases[f"{kind}, {place}, {workers} workers, static"] = common | {"dataloader_num_workers": workers}
            if kind in ("grpo", "rloo"):
                cases[f"{kind}, {place}, 0 workers, adaptive by rewards"] = common | {
                    "attach_options": {"online": "rewards"}
                }
                continue
            for workers in (0, 2):
                for name, online in (("tap", TAP_EVERYTHING), ("refresh", REFRESH_OFTEN)):
                    measured = {"dataloader_num_workers": workers, "attach_options": {"online": online}}
                    cases[f"{kind}, {place}, {workers} workers, adaptive by {name}"] = common | measured
    inside = {"kind": "grpo", "num_train_epochs": 3, "steps_per_generation": 2, "num_iterations": 2}
    for name, attach_options in (("static", {}), ("adaptive by rewards", {"online": "rewards"})):
        cases[f"grpo, inside a generation cycle, {name}"] = inside | {"save_at": 3, "attach_options": attach_options}
        accumulating = {
            "kind": "sft" if name == "static" else "grpo",
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
        }
        cases[f"accumulation, {name}"] = accumulating | {"save_at": steps // 2 + 1, "attach_options": attach_options}
    cases["grpo, inside a generation cycle, adaptive by rewards and tap"] = inside | {
        "save_at": 3,
        "attach_options": {"online": REWARDS_AND_TAP},
    }
    for name, online in (("tap", TAP_EVERYTHING), ("refresh", REFRESH_OFTEN)):
        cases[f"accumulation, adaptive by {name}"] = {
            "kind": "sft", "gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_at": steps // 2 + 1,
            "attach_options": {"online": online},
        }  # fmt: skip
    return cases


def same_tail(seen: dict[str, list[list[str]]]) -> bool:
    """Whether the resumed run saw what the whole one saw after the checkpoint."""
    whole, resumed = seen["whole"], seen["resumed"]
    return 0 < len(resumed) < len(whole) and whole[-len(resumed) :] == resumed


def measured(
    kind: str, out: Path, *, online: str, settings: Any, sharded: bool = False, lora: bool = False, **options: Any
) -> dict[str, Any]:
    """Train with a signal that measures, and return its values, the losses of the steps and whether the weights were parted.

    Args:
        online: name of the signal's class.
        settings: of the signal.
        sharded: part the weights among the processes by FSDP2, which Accelerate itself does on GPUs alone.
    """
    from selector import sampling
    from selector.integrations.trl import attach
    from selector.scorer.sharding import is_sharded

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    network = (adapted_model if lora else model)(tokenizer, num_hidden_layers=2)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        for layer in [module for module in network.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
    trained = trainer(kind, out, dataset(30, kind), network, logging_strategy="steps", logging_steps=1, **options)
    if sharded:
        trained.accelerator.prepare_model = lambda network, *_, **__: network  # instead of DDP
    signal = getattr(sampling, online)(**settings)
    if kind == "grpo":
        trained.reward_funcs = [lambda id, **columns: [float(name in REWARDED_IDS) for name in id]]
    attach(trained, selection(TRAINED_IDS), online=signal, coverage=1.0)
    trained.train()
    return {
        "values": (signal.pass_rates() if online == "RewardSignal" else signal.values).tolist(),
        "losses": [entry["loss"] for entry in trained.state.log_history if "loss" in entry],
        "sharded": is_sharded(trained.model),
    }


def run_on_two_ranks(cases: dict[str, dict[str, Any]], out: Path) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes gives in each case: `measured` where it names a signal's class, else `resume`."""
    (out / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, str(out / "cases.json"), str(out)], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[:4000] + done.stderr[-2000:])
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {
        name: (measured if "online" in case else resume)(out=out / str(i), **case)
        for i, (name, case) in enumerate(cases.items())
    }
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    import conftest  # noqa: F401  # maps selector.integrations to its folder

    main()
