"""Samples scored again during training: with the offline scorer's numbers, and without a trace in the training itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_cases as cases
from hypothesis import given
from hypothesis import strategies as st
from oracles import autograd_gradients, dense_measures

from selector.data.samples import Sample, TokenSequence
from selector.errors import ConfigError, IntegrationError
from selector.integrations.trl import attach
from selector.sampling import RefreshSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:This trainer will soon be moved:UserWarning"),
]

IDS = cases.TRAINED_IDS


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"gradient_accumulation_steps": 2}),
        ("sft", {"padding_free": True, "max_length": None, "gradient_checkpointing": True}),
        ("dpo", {}),
        ("dpo", {"lora": True}),
        pytest.param("dpo", {"precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        pytest.param("sft", {"lora": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_refreshed_scores_are_those_of_the_offline_scorer_at_the_same_weights(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The weights have moved since the start, and the last refresh comes after the last step."""
    signal = RefreshSignal(every=4, pool_share=1.0, measure="nuclear_norm")
    trainer = cases.trainer(kind, tmp_path, cases.dataset(30, kind), max_steps=4, learning_rate=0.1, **options)
    attach(trainer, cases.selection(IDS), online=signal)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not all(map(torch.equal, before, trainer.model.parameters()))
    expected = cases.offline(kind, "nuclear_norm", tmp_path / "store", trainer.model, cases.reference(trainer))
    np.testing.assert_allclose(signal.values, expected, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_a_plain_trainer_s_samples_have_the_spectra_of_dense_gradients(checkpointing: Any, tmp_path: Path) -> None:
    signal = RefreshSignal(every=3, pool_share=0.5, measure="nuclear_norm")
    options = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    trainer = cases.trainer("plain", tmp_path, cases.dataset(30, "plain"), max_steps=3, learning_rate=0.1, **options)
    attach(trainer, cases.selection(IDS), online=signal)
    trainer.train()
    scored = np.flatnonzero(np.isfinite(signal.values))
    assert len(scored) == 12
    sampler = trainer._get_train_sampler()
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qkvo"]
    for i in scored[:4]:
        row = trainer.train_dataset[int(sampler.rows[i])]
        tokens = np.array(row["input_ids"], np.int32)[np.array(row["attention_mask"]) == 1]
        mask = np.arange(len(tokens)) > 0
        gradients = autograd_gradients(trainer.model, Sample("", 0, None, (TokenSequence(tokens, mask),)), names)
        expected = np.mean([dense_measures(gradient)["nuclear_norm"] for gradient in gradients.values()])
        assert signal.values[i] == pytest.approx(expected, rel=1e-4)


def trained(
    kind: str, out: Path, every: int, network: Any, **options: Any
) -> tuple[list[list[str]], list[tuple[Any, ...]], dict[str, torch.Tensor]]:
    """Samples, losses and final state of a run whose refreshes have no effect on what is drawn."""
    signal = RefreshSignal(every=every, pool_share=0.3, richness=0.0)
    trainer = cases.trainer(
        kind, out, cases.dataset(30, kind), network, max_steps=6, logging_strategy="steps", logging_steps=1,
        optim="adamw_torch", **options,
    )  # fmt: skip
    attach(trainer, cases.selection(IDS), online=signal)
    seen = cases.record(trainer)
    noted: list[tuple[bool, ...]] = []
    trainer.add_callback(cases.AtStepEnd(lambda: noted.append(flags(trainer.model))))
    trainer.train()
    assert np.isfinite(signal.values).any() == (every == 1)
    logged = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    moments = {
        f"{i}.{name}": value
        for i, state in enumerate(trainer.optimizer.state.values())
        for name, value in state.items()
    }
    rng = {"rng": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}
    return seen, [*logged, *noted], {**trainer.model.state_dict(), **moments, **rng}


def flags(model: Any) -> tuple[bool, ...]:
    """Whether each parameter requires and has a gradient, and each module trains."""
    parameters = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return tuple(flag for pair in parameters for flag in pair) + tuple(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"gradient_accumulation_steps": 2, "bf16": True}),
        ("sft", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("dpo", {"lora": True, "gradient_checkpointing": True}),
        pytest.param("sft", {"lora": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param("dpo", {"bf16": True}, marks=pytest.mark.slow),
        pytest.param("plain", {}, marks=pytest.mark.slow),
    ],
)
def test_a_refresh_leaves_no_trace_in_the_training(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With dropout on, whose random numbers must be those of a run that is never refreshed."""
    tokenizer = cases.AutoTokenizer.from_pretrained(cases.TINY_MODEL)
    make = cases.adapted_model if options.pop("lora", False) else cases.model
    (seen, logged, state), (seen_without, logged_without, state_without) = (
        trained(kind, tmp_path / str(every), every, make(tokenizer, attention_dropout=0.1), **options)
        for every in (1, 1000)
    )
    assert seen == seen_without
    assert logged == logged_without
    assert state.keys() == state_without.keys()
    assert [name for name in state if not torch.equal(state[name], state_without[name])] == []


@given(
    n=st.integers(1, 60), share=st.floats(0.01, 1.0), seed=st.integers(0, 99), step=st.integers(1, 9),
)  # fmt: skip
def test_no_sample_waits_longer_for_a_refresh_than_stated(n: int, share: float, seed: int, step: int) -> None:
    signal = RefreshSignal(pool_share=share)
    signal.bind(np.array([f"s{i:02d}" for i in range(n)]), np.arange(n, dtype=float))
    weights = np.random.default_rng(seed).exponential(size=n) ** 8
    count = int(np.ceil(share * n))
    bound = -(-n // -(-count // 2))
    last = np.zeros(n, dtype=int)
    for number in range(1, min(3 * bound, 40)):
        due = signal.due(weights, number * step)
        assert len(set(due.tolist())) == len(due) == count
        signal.refreshed(
            due, np.full(count, np.nan if seed % 2 else 1.0), np.ones(count, dtype=np.int64), number * step
        )
        last[due] = number
        assert number - last.min() <= bound


def test_the_likeliest_samples_come_before_their_turn() -> None:
    signal = RefreshSignal(pool_share=0.2)
    signal.bind(np.array(list("abcdefghij")), np.arange(10.0))
    weights = np.ones(10)
    weights[7] = 100.0
    rounds = []
    for step in (1, 2, 3, 4):
        due = signal.due(weights, step)
        rounds.append(due.tolist())
        signal.refreshed(due, np.ones(2), np.ones(2, dtype=np.int64), step)
    assert [7 in due for due in rounds] == [True] * 4
    assert sorted(position for due in rounds for position in due if position != 7) == [0, 1, 2, 3]


def test_a_restored_signal_finds_the_same_samples_due() -> None:
    signal, restored = (RefreshSignal(pool_share=0.3) for _ in range(2))
    for each in (signal, restored):
        each.bind(np.array(list("abcdefghij")), np.arange(10.0))
    for step in range(1, 4):
        due = signal.due(signal.weights(), step)
        signal.refreshed(due, np.linspace(1, 2, 3), np.arange(1, 4), step)
    restored.load_state_dict(signal.state_dict())
    assert restored.due(restored.weights(), 4).tolist() == signal.due(signal.weights(), 4).tolist()
    assert RefreshSignal(pool_share=0.3).identity() == signal.identity() != RefreshSignal(pool_share=0.2).identity()


def test_what_cannot_be_scored_again_is_refused(tmp_path: Path) -> None:
    for kind in ("grpo", "rloo"):
        with pytest.raises(IntegrationError, match=r"(?s)old rollouts do not show.*online='tap'"):
            attach(cases.trainer(kind, tmp_path, cases.dataset(30, kind)), cases.selection(IDS), online="refresh")
    with pytest.raises(IntegrationError, match="not a sum over rows"):
        attach(cases.trainer("kto", tmp_path, cases.dataset(30, "kto")), cases.selection(IDS), online="refresh")
    other = cases.trainer("dpo", tmp_path, cases.dataset(30, "dpo"), loss_type="ipo", label_smoothing_factor=0.1)
    with pytest.raises(IntegrationError, match=r"(?s)label_smoothing_factor=0.1; loss_type=\[?'ipo'"):
        attach(other, cases.selection(IDS), online="refresh")
    with pytest.raises(ConfigError, match=r"(?s)every counts optimizer steps.*pool_share is a part.*other measures"):
        RefreshSignal(every=0, pool_share=0.0, measure="stable_rank")


def test_batches_that_hold_more_than_text_are_refused_when_training_begins(tmp_path: Path) -> None:
    trainer = cases.trainer("plain", tmp_path, cases.dataset(30, "plain"), remove_unused_columns=False)
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([r["input_ids"] for r in rows]), "pixel_values": 0}
    attach(trainer, cases.selection(IDS), online="refresh")
    with pytest.raises(IntegrationError, match=r"(?s)batches cannot be scored.*pixel_values"):
        trainer.train()


def test_a_refreshed_run_reports_in_the_trainer_s_own_log(tmp_path: Path) -> None:
    signal = RefreshSignal(every=2, pool_share=0.25)
    data = cases.dataset(30, "sft").add_column("source", ["web", "book"] * 15)
    trainer = cases.trainer("sft", tmp_path, data, max_steps=4, logging_strategy="steps", logging_steps=1)
    attach(trainer, cases.selection(IDS), online=signal)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["selector/measured"] for entry in logged] == [0, 0.25, 0.25, 0.5]
    assert np.isnan(logged[0]["selector/live_effective_rank"])
    assert logged[-1]["selector/live_effective_rank"] > 1
    assert all(0 <= entry["selector/overhead"] < 1 for entry in logged)
    assert logged[1]["selector/overhead"] > logged[0]["selector/overhead"]
    assert all(entry["selector/share/web"] + entry["selector/share/book"] == 1 for entry in logged)
    for name in ("coverage", "effective_samples", "mean_score"):
        assert all(np.isfinite(entry[f"selector/{name}"]) for entry in logged)
    assert sorted(set(signal.measured_at.tolist())) == [-1, 2, 4]
