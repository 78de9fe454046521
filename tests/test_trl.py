"""A selection attached to real trainers: right samples, same order on every rank and after every resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_cases as cases
from trl import SFTConfig

from selector.errors import ConfigError, IntegrationError, SelectionError
from selector.integrations.trl import attach
from selector.sampling import AdaptiveSampler, FocusSignal, RewardSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:This trainer will soon be moved:UserWarning"),
]

IDS = [f"s{i}" for i in range(3, 23, 2)]
KINDS = ["sft", "dpo", "kto", "plain", "grpo", "rloo"]


def train(trainer: Any) -> list[str]:
    """Train, and return the samples in the order in which they were trained on."""
    seen = cases.record(trainer)
    trainer.train()
    return [sample for step in seen for sample in step]


def sft(out: Path, data: cases.Dataset | None = None, **options: Any) -> Any:
    return cases.trainer("sft", out, data or cases.dataset(40, "sft"), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_trains_on_each_selected_sample_once(kind: str, tmp_path: Path) -> None:
    trainer = cases.trainer(kind, tmp_path, cases.dataset(40, kind), num_train_epochs=2)
    assert attach(trainer, cases.selection(IDS)) is trainer
    seen = train(trainer)
    if kind in ("grpo", "rloo"):
        assert seen[::2] == seen[1::2]
        seen = seen[::2]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(IDS)
    assert seen[:10] != seen[10:]


def test_the_order_is_the_same_on_the_whole_data_set_and_on_the_applied_subset(tmp_path: Path) -> None:
    selection, whole = cases.selection(IDS), cases.dataset(40, "sft")
    orders = [train(attach(sft(tmp_path, data), selection)) for data in (whole, selection.apply(whole))]
    assert orders[0] == orders[1]


def test_rows_that_the_trainer_drops_shift_nothing(tmp_path: Path) -> None:
    data = cases.dataset(40, "sft").to_list()
    for i in (0, 4, 9):
        data[i]["prompt"] = data[i]["prompt"] * 30  # fills max_length, so that no loss token is left
    trainer = sft(tmp_path, cases.Dataset.from_list(data))
    if len(trainer.train_dataset) == 40:
        pytest.skip("TRL 0.24 drops no rows")
    with pytest.warns(UserWarning, match="1 of 10 selected samples are not in the trainer's data set"):
        attach(trainer, cases.selection(IDS))
    order = train(attach(sft(tmp_path), cases.selection(IDS)))
    assert train(trainer) == [sample for sample in order if sample != "s9"]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_rows_without_ids_are_known_by_their_content(kind: str, tmp_path: Path) -> None:
    from selector.data.ids import content_hash, content_ids

    data = cases.dataset(40, "sft")
    hashes = content_ids(content_hash({name: row[name] for name in ("prompt", "completion")}) for row in data)
    picked = cases.selection(IDS)
    picked = replace(picked, ids=np.array([hashes[row] for row in picked.rows]))
    trainer = cases.trainer(kind, tmp_path, data.rename_column("id", "name"))
    attach(trainer, picked)
    assert sorted(trainer._get_train_sampler().rows.tolist()) == sorted(picked.rows.tolist())


def test_a_data_set_without_selected_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match="nothing in the train data set tells which sample a row is"):
        attach(sft(tmp_path), cases.selection(["s100", "s101"]))
    with pytest.raises(SelectionError, match="no sample of the selection"):
        attach(sft(tmp_path), cases.selection(["s100", "s101"]), id_column="id")
    with pytest.raises(IntegrationError, match="did you mean 'id'"):
        attach(sft(tmp_path), cases.selection(IDS), id_column="ids")


def test_settings_that_lose_sample_identity_are_refused_together(tmp_path: Path) -> None:
    fields = SFTConfig.__dataclass_fields__
    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in fields:  # transformers 4
        by_length = {"group_by_length": True}
    trainer = sft(tmp_path, accelerator_config={"dispatch_batches": True}, max_steps=1, **by_length)
    trainer.args.packing = True
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(IntegrationError) as error:
        attach(trainer, cases.selection(IDS))
    found = [line.split(":", 1)[1].strip() for line in str(error.value).splitlines() if "got:" in line]
    assert found == [
        "IterableDataset",
        "packing=True",
        "dispatch_batches=True",
        "train_sampling_strategy='group_by_length'",
    ]


def test_weights_that_could_not_follow_the_rewards_are_refused(tmp_path: Path) -> None:
    trainer = cases.trainer(
        "grpo", tmp_path, cases.dataset(40, "grpo"), dataloader_num_workers=2, remove_unused_columns=True
    )
    with pytest.raises(IntegrationError, match=r"(?s)dataloader_num_workers=2.*remove_unused_columns=True"):
        attach(trainer, cases.selection(IDS), online="rewards")
    with pytest.raises(IntegrationError, match="computes no rewards"):
        attach(sft(tmp_path), cases.selection(IDS), online="rewards")
    with pytest.raises(ConfigError, match="did you mean 'rewards'"):
        attach(trainer, cases.selection(IDS), online="reward")


def test_every_batch_has_its_share_of_each_source(tmp_path: Path) -> None:
    data = cases.dataset(40, "sft")
    data = data.add_column("source", ["web" if i < 20 else "book" for i in range(40)])
    picked = cases.selection([f"s{i}" for i in range(12, 28)])
    seen = train(attach(sft(tmp_path, data), picked, strata="source"))
    assert all((int(a[1:]) < 20) != (int(b[1:]) < 20) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_the_sampler_reports_in_the_trainer_s_own_log(tmp_path: Path) -> None:
    trainer = sft(tmp_path, logging_strategy="steps", logging_steps=1, num_train_epochs=1)
    train(attach(trainer, cases.selection(IDS), curriculum="high-to-low"))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["selector/coverage"] for entry in logged] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(entry["selector/effective_samples"] == pytest.approx(10) for entry in logged)
    assert logged[0]["selector/mean_score"] > logged[-1]["selector/mean_score"]
    assert all(0 <= entry["selector/overhead"] < 1 for entry in logged)


def test_rewards_reach_the_prompts_that_earned_them(tmp_path: Path) -> None:
    signal = RewardSignal(richness=0.0)
    earned: list[tuple[str, float]] = []

    def even(completion_ids: list[list[int]], id: list[str], **columns: Any) -> list[float]:
        rewards = [float(int(name[1:]) % 4 == 1) for name in id]
        earned.extend(zip(id, rewards, strict=True))
        return rewards

    trainer = cases.trainer(
        "grpo", tmp_path, cases.dataset(40, "grpo"), num_train_epochs=3, logging_strategy="steps", logging_steps=1
    )
    trainer.reward_funcs = [even]
    train(attach(trainer, cases.selection(IDS), online=signal))
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, AdaptiveSampler)
    rates = dict(zip(sampler.ids.tolist(), signal.pass_rates().tolist(), strict=True))
    assert all((rates[name] > 0.5) == (reward == 1.0) for name, reward in earned)
    assert trainer.state.log_history[0]["selector/uniform_groups"] == 1.0


def test_a_focus_signal_drives_a_trainer(tmp_path: Path) -> None:
    signal = FocusSignal(step=0.2)
    trainer = cases.trainer("rloo", tmp_path, cases.dataset(40, "rloo"))
    trainer.reward_funcs = [lambda completion_ids, **columns: [1.0] * len(completion_ids)]
    train(attach(trainer, cases.selection(IDS), online=signal))
    assert signal.center > 0.5


GRID = cases.grid(1)
SOME = [
    "sft, epoch 1, middle, 0 workers, static",
    "dpo, epoch 0, middle, 2 workers, static",
    "grpo, epoch 1, edge, 0 workers, adaptive by rewards",
    "rloo, epoch 1, middle, 0 workers, adaptive by rewards",
    "grpo, inside a generation cycle, static",
    "grpo, inside a generation cycle, adaptive by rewards",
    "grpo, inside a generation cycle, adaptive by rewards and tap",
    "accumulation, static",
    "sft, epoch 1, middle, 2 workers, adaptive by tap",
    "dpo, epoch 1, middle, 0 workers, adaptive by refresh",
    "sft, epoch 0, edge, 2 workers, adaptive by refresh",
    "accumulation, adaptive by refresh",
]
"""One case for each way in which a resume can go wrong; the rest of the grid is slow."""


@pytest.mark.parametrize("case", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in GRID])
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(case: str, tmp_path: Path) -> None:
    assert cases.same_tail(cases.resume(out=tmp_path, **GRID[case]))


def agree_and_resume(names: list[str], out: Path) -> None:
    grid = cases.grid(2)
    ranks = cases.run_on_two_ranks({name: grid[name] for name in names}, out)
    assert [name for name in names if not all(cases.same_tail(rank[name]) for rank in ranks)] == []
    for name in names:
        first_epoch = [rank[name]["whole"][:6] for rank in ranks]
        both = [sorted(a + b) for a, b in zip(*first_epoch, strict=True)]
        if "static" in name and "generation cycle" not in name:
            drawn = [sample for step in both for sample in step]
            copies = 1 if name.startswith(("sft", "dpo", "accumulation")) else 2
            assert len(drawn) == copies * len(set(drawn)) == copies * 24, name


def test_two_ranks_agree_and_resume_exactly(tmp_path: Path) -> None:
    agree_and_resume([SOME[0], SOME[3], *SOME[6:10]], tmp_path)


@pytest.mark.slow
def test_two_ranks_agree_and_resume_exactly_everywhere(tmp_path: Path) -> None:
    agree_and_resume(list(cases.grid(2)), tmp_path)


def test_a_resume_inside_a_generation_cycle_trains_on_the_same_completions(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2, "num_train_epochs": 2}
    losses = []
    for resumed in (False, True):
        trainer = cases.trainer(
            "grpo", tmp_path, cases.dataset(30, "grpo"), logging_strategy="steps", logging_steps=1, **options
        )
        attach(trainer, cases.selection(IDS), online="rewards")
        trainer.add_callback(cases.SaveAt(6))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resumed else None)
        losses.append(
            [
                (entry["step"], entry["loss"], entry["grad_norm"])
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        )
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        losses.append(weights.sum().item())
    assert losses[2] == losses[0]
    assert losses[3] == losses[1]


def test_a_checkpoint_made_without_the_selection_resumes_with_a_warning(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.add_callback(cases.SaveAt(2))
    trainer.train()
    resumed = attach(sft(tmp_path), cases.selection([f"s{i}" for i in range(40)]))
    with pytest.warns(UserWarning, match="holds no sampler state"):
        resumed.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_selection_is_refused(tmp_path: Path) -> None:
    trainer = attach(sft(tmp_path), cases.selection(IDS))
    trainer.add_callback(cases.SaveAt(2))
    trainer.train()
    with pytest.raises(SelectionError, match="the checkpoint belongs to another order of samples"):
        attach(sft(tmp_path), cases.selection([*IDS[:-1], "s2"])).train(resume_from_checkpoint=True)
