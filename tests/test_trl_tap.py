"""Spectra from a trainer's own backward pass are those of the offline scorer, whatever the trainer does to its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainer_cases as cases

from selector.errors import ConfigError, IntegrationError
from selector.integrations._tap import affordable
from selector.integrations.trl import attach
from selector.sampling import RewardSignal, TapSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:This trainer will soon be moved:UserWarning"),
]

IDS = cases.TRAINED_IDS
PROJECTIONS = ("q", "k", "v", "o")


def tapped(kind: str, measure: str, out: Path, **options: Any) -> tuple[Any, np.ndarray]:
    """The trainer, and [24] the mean of a measure over the layers, in the order of sorted ids, from an epoch of training that leaves the weights as they are."""
    signal = TapSignal(measure=measure, share=None, projections=PROJECTIONS)
    trainer = cases.trainer(kind, out, cases.dataset(30, kind), learning_rate=0.0, num_train_epochs=2, **options)
    attach(trainer, cases.selection(IDS), online=signal, coverage=1.0)
    trainer.train()
    return trainer, signal.values


@pytest.mark.parametrize(
    ("kind", "measure", "options"),
    [
        ("sft", "nuclear_norm", {"gradient_accumulation_steps": 3}),
        ("sft", "nuclear_norm", {"padding_free": True, "max_length": None}),
        (
            "sft",
            "effective_rank",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
        ("sft", "nuclear_norm", {"lora": True}),
        ("dpo", "nuclear_norm", {"lora": True, "gradient_checkpointing": True}),
        ("dpo", "nuclear_norm", {"gradient_accumulation_steps": 2}),
        pytest.param("sft", "nuclear_norm", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("sft", "effective_rank", {"padding_free": True, "max_length": None}, marks=pytest.mark.slow),
        pytest.param("dpo", "effective_rank", {}, marks=pytest.mark.slow),
    ],
)
def test_tapped_spectra_are_those_of_the_offline_scorer(
    kind: str, measure: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, values = tapped(kind, measure, tmp_path / "run", **options)
    expected = cases.offline(kind, measure, tmp_path / "store", trainer.model, cases.reference(trainer))
    np.testing.assert_allclose(values, expected, rtol=2e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_under_bfloat16_they_are_close_to_those_of_the_offline_scorer(kind: str, tmp_path: Path) -> None:
    """Mixed precision: the bound is that of the offline scorer for 16-bit models."""
    expected = cases.offline(kind, "nuclear_norm", tmp_path / "store")
    _, found = tapped(kind, "nuclear_norm", tmp_path / "run", bf16=True, gradient_accumulation_steps=2)
    assert np.linalg.norm(found - expected) < 5e-2 * np.linalg.norm(expected)


def test_a_plain_trainer_is_measured_too(tmp_path: Path) -> None:
    _, values = tapped("plain", "nuclear_norm", tmp_path)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("cycle", [{}, {"steps_per_generation": 2, "num_iterations": 2}])
def test_rollouts_are_measured_for_the_prompt_that_they_answer(cycle: dict[str, Any], tmp_path: Path) -> None:
    """Rewards are uniform for all prompts but one, whose rollouts alone have a gradient."""
    signal = TapSignal(share=None)
    trainer = cases.trainer("grpo", tmp_path, cases.dataset(30, "grpo"), num_train_epochs=2, num_generations=4, **cycle)
    trainer.reward_funcs = [lambda id, **columns: [float(i % 2) if name == "s7" else 1.0 for i, name in enumerate(id)]]
    attach(trainer, cases.selection(IDS), online=signal, coverage=1.0)
    trainer.train()
    measured = [name for name, value in zip(sorted(IDS), signal.values, strict=True) if np.isfinite(value)]
    assert measured == ["s7"]


def test_a_group_that_is_split_over_steps_and_ranks_counts_once(tmp_path: Path) -> None:
    """Four rollouts of a prompt, two per step: its value is the mean over all four, whichever step they came in."""
    found: list[tuple[list[int], list[float]]] = []
    signal = TapSignal(share=None)
    observe = signal.observe

    def noting(positions: Any, values: Any, *rest: Any) -> None:
        found.append((positions.tolist(), values.tolist()))
        observe(positions, values, *rest)

    signal.observe = noting  # pyright: ignore[reportAttributeAccessIssue]
    options = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = cases.trainer("grpo", tmp_path, cases.dataset(30, "grpo"), **options)
    trainer.reward_funcs = [lambda completion_ids, **columns: [float(i) for i in range(len(completion_ids))]]
    attach(trainer, cases.selection(IDS), online=RewardSignal(spectra=signal))
    trainer.train()
    assert len(found) == 4
    everything = np.array([pair for positions, values in found for pair in zip(positions, values, strict=True)])
    drawn, counts = np.unique(everything[:, 0], return_counts=True)
    assert counts.tolist() == [4, 4]
    for position in drawn.astype(int).tolist():
        expected = everything[everything[:, 0] == position, 1].mean()
        assert signal.values[position] == pytest.approx(expected)


def test_a_tapped_run_reports_in_the_trainer_s_own_log(tmp_path: Path) -> None:
    data = cases.dataset(30, "sft").add_column("source", ["web", "book"] * 15)
    trainer = cases.trainer("sft", tmp_path, data, max_steps=4, logging_strategy="steps", logging_steps=1)
    attach(trainer, cases.selection(IDS), online=TapSignal(share=None))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    measured = [entry["selector/measured"] for entry in logged]
    assert 0 < measured[0] <= 1 / 12
    assert measured == sorted(measured)
    assert all(0 < entry["selector/overhead"] < 1 for entry in logged)
    assert all(entry["selector/share/web"] + entry["selector/share/book"] == 1 for entry in logged)
    for name in ("coverage", "effective_samples", "mean_score", "live_effective_rank"):
        assert all(np.isfinite(entry[f"selector/{name}"]) for entry in logged)


def test_a_share_of_the_step_decides_how_much_is_measured(tmp_path: Path) -> None:
    signal = TapSignal(share=0.5)
    trainer = cases.trainer("sft", tmp_path, cases.dataset(30, "sft"), num_train_epochs=3)
    attach(trainer, cases.selection(IDS), online=signal)
    trainer.train()
    assert signal.layers == 1
    assert signal.every >= 1
    assert np.isfinite(signal.values).any()


def test_the_share_buys_layers_and_then_steps() -> None:
    assert affordable(0.05, step=1.0, tapped=1.35, layers=32) == (4, 1)
    assert affordable(0.05, step=1.0, tapped=1.01, layers=32) == (32, 1)
    assert affordable(0.05, step=1.0, tapped=5.0, layers=20) == (1, 4)
    assert affordable(0.05, step=1.0, tapped=0.9, layers=20) == (20, 1)


def test_live_measurements_outweigh_the_scores_they_replace() -> None:
    signal = TapSignal()
    signal.bind(np.array(["a", "b", "c", "d"]), np.arange(4.0))
    prior = signal.weights()
    tokens = np.array([10, 10, 20, 20])
    signal.observe(np.arange(4), np.array([5.0, 2.0, 4.0, 9.0]), tokens, step=7)
    assert prior.argsort().tolist() == [0, 1, 2, 3]
    assert set(signal.weights().argsort()[:2].tolist()) == {1, 2}, "4 is little for 20 tokens"
    assert signal.measured_at.tolist() == [7] * 4


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    grpo = cases.trainer("grpo", tmp_path, cases.dataset(30, "grpo"))
    with pytest.raises(IntegrationError, match="nuclear_norm under a policy-gradient loss"):
        attach(grpo, cases.selection(IDS), online=TapSignal(measure="nuclear_norm"))
    with pytest.raises(IntegrationError, match="not a sum over rows"):
        attach(cases.trainer("kto", tmp_path, cases.dataset(30, "kto")), cases.selection(IDS), online="tap")
    with pytest.raises(ConfigError, match="share is a part"):
        TapSignal(share=1.5)
    with pytest.raises(ConfigError, match="stride counts layers"):
        TapSignal(stride=0)
