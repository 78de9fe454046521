"""A selection attached to real trainers on the tiny model: right samples, same order on every rank and after every resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trainer_cases as cases
from selector.errors import IntegrationError, SelectionError
from selector.integrations.trl import attach

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:torch"
)

IDS = [f"s{i}" for i in range(3, 23, 2)]


def train(trainer: Any) -> list[str]:
    seen = cases.record(trainer)
    trainer.train()
    return [sample for step in seen for sample in step]


def test_an_epoch_trains_on_each_selected_sample_once(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = cases.sft(tiny_model_path, tmp_path, cases.dataset(40, "sft"), num_train_epochs=2)
    assert attach(trainer, cases.selection(IDS)) is trainer
    seen = train(trainer)
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(IDS)
    assert seen[:10] != seen[10:]


def test_the_order_is_the_same_on_the_whole_data_set_and_on_the_applied_subset(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    selection, whole = cases.selection(IDS), cases.dataset(40, "sft")
    subset = selection.apply(whole)
    orders = [train(attach(cases.sft(tiny_model_path, tmp_path, data), selection)) for data in (whole, subset)]
    assert orders[0] == orders[1]


def test_rows_that_the_trainer_drops_shift_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    data = cases.dataset(40, "sft").to_list()
    for i in (0, 4, 9):
        data[i]["prompt"] = data[i]["prompt"] * 30  # fills max_length, so that no loss token is left
    trainer = cases.sft(tiny_model_path, tmp_path, cases.Dataset.from_list(data))
    assert len(trainer.train_dataset) == 37
    with pytest.warns(UserWarning, match="1 of 10 selected samples are not in the trainer's data set"):
        attach(trainer, cases.selection(IDS))
    order = train(attach(cases.sft(tiny_model_path, tmp_path, cases.dataset(40, "sft")), cases.selection(IDS)))
    assert train(trainer) == [sample for sample in order if sample != "s9"]


def test_a_data_set_without_selected_samples_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = cases.sft(tiny_model_path, tmp_path, cases.dataset(40, "sft"))
    with pytest.raises(SelectionError, match="no sample of the selection"):
        attach(trainer, cases.selection(["s100", "s101"]))


def test_settings_that_lose_sample_identity_are_refused_together(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = cases.sft(
        tiny_model_path,
        tmp_path,
        cases.dataset(40, "sft"),
        train_sampling_strategy="group_by_length",
        accelerator_config={"dispatch_batches": True},
    )
    trainer.args.packing = True
    with pytest.raises(IntegrationError) as error:
        attach(trainer, cases.selection(IDS))
    assert all(
        f"got:     {got}" in str(error.value)
        for got in ("packing=True", "dispatch_batches=True", "train_sampling_strategy")
    )


def test_a_data_set_without_ids_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    data = cases.dataset(40, "sft").remove_columns("id")
    with pytest.raises(IntegrationError, match="no column of the train data set holds sample ids"):
        attach(cases.sft(tiny_model_path, tmp_path, data), cases.selection(IDS))


def resumed_tail_matches(result: dict[str, list[list[str]]]) -> bool:
    whole, resumed = result["whole"], result["resumed"]
    return 0 < len(resumed) < len(whole) and whole[-len(resumed) :] == resumed


RESUMES: dict[str, dict[str, Any]] = {
    "middle of epoch 0": dict(save_at=3),
    "middle of epoch 1": dict(save_at=12),
    "end of epoch 0": dict(save_at=9),
    "accumulation": dict(save_at=7, gradient_accumulation_steps=2),
    "workers": dict(save_at=12, dataloader_num_workers=2),
}
"""34 samples in batches of 2: 17 steps an epoch in one process, 9 in two."""


@pytest.mark.parametrize("case", list(RESUMES))
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(case: str, tiny_model_path: Path, tmp_path: Path) -> None:
    options = dict(RESUMES[case])
    options["save_at"] = {"end of epoch 0": 17, "middle of epoch 1": 22, "accumulation": 13}.get(
        case, options["save_at"]
    )
    result = cases.resume(tiny_model_path, tmp_path, num_train_epochs=2, **options)
    assert resumed_tail_matches(result)


def test_two_ranks_agree_and_resume_exactly(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(
        json.dumps({name: dict(case, num_train_epochs=2) for name, case in RESUMES.items()})
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(Path(cases.__file__)), str(tiny_model_path), str(tmp_path / "cases.json"), str(tmp_path)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, *script],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for case in RESUMES:
        assert all(resumed_tail_matches(rank[case]) for rank in ranks), case
        first_epoch = [set(sum(rank[case]["whole"][:8], [])) for rank in ranks]
        assert not first_epoch[0] & first_epoch[1], case
