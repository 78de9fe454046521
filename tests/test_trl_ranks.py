"""Measurements taken on two processes, with whole and with sharded weights, are those of one process, and every rank has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trainer_cases as cases

TAP = {
    "online": "TapSignal",
    "settings": {"share": None, "measure": "nuclear_norm"},
    "learning_rate": 0.0,
    "num_train_epochs": 1,
}
REFRESH = {
    "online": "RefreshSignal",
    "settings": {"every": 2, "pool_share": 0.8, "measure": "nuclear_norm"},
    "learning_rate": 0.0,
    "max_steps": 6,
}
MEASURED: dict[str, dict[str, Any]] = {
    "sft, tap": {"kind": "sft", **TAP, "gradient_accumulation_steps": 2},
    "sft, refresh": {"kind": "sft", **REFRESH, "gradient_accumulation_steps": 2},
    "dpo, refresh": {"kind": "dpo", **REFRESH},
    "sft, sharded, tap": {"kind": "sft", **TAP, "sharded": True, "gradient_checkpointing": True},
    "sft, sharded, refresh": {"kind": "sft", **REFRESH, "sharded": True, "gradient_checkpointing": True},
    "plain, sharded, lora, tap": {"kind": "plain", **TAP, "sharded": True, "lora": True},
    "plain, sharded, lora, refresh": {"kind": "plain", **REFRESH, "sharded": True, "lora": True},
}


REWARDS = {
    "kind": "grpo",
    "online": "RewardSignal",
    "settings": {},
    "per_device_train_batch_size": 2,
    "num_generations": 4,
    "max_steps": 8,
}
"""One group spans both ranks."""


def untouched(every: int, sharded: bool) -> dict[str, Any]:
    """A run whose refreshes have no effect on what is drawn."""
    settings = {"every": every, "pool_share": 0.3, "richness": 0.0}
    return {"kind": "sft", "online": "RefreshSignal", "settings": settings, "sharded": sharded, "max_steps": 4}


def test_two_ranks_measure_what_one_does_and_agree(tmp_path: Path) -> None:
    traces = {f"{sharded}, {every}": untouched(every, sharded) for sharded in (False, True) for every in (1, 1000)}
    one, other = cases.run_on_two_ranks(MEASURED | traces | {"rewards": REWARDS}, tmp_path)
    tokenizer = cases.AutoTokenizer.from_pretrained(cases.TINY_MODEL)
    network = cases.model(tokenizer, num_hidden_layers=2)
    references = {"sft": None, "dpo": cases.model(tokenizer)}
    expected = {
        kind: cases.offline(kind, "nuclear_norm", tmp_path / kind, network, reference)
        for kind, reference in references.items()
    }
    for name, case in MEASURED.items():
        assert one[name] == other[name] | {"losses": one[name]["losses"]}, name
        assert one[name]["sharded"] == case.get("sharded", False), name
        if case["kind"] != "plain":
            np.testing.assert_allclose(one[name]["values"], expected[case["kind"]], rtol=2e-4, err_msg=name)
    tapped, refreshed = (one[f"plain, sharded, lora, {way}"]["values"] for way in ("tap", "refresh"))
    np.testing.assert_allclose(tapped, refreshed, rtol=2e-4)
    for sharded in (False, True):
        with_refresh, without = (one[f"{sharded}, {every}"] for every in (1, 1000))
        assert np.isfinite(with_refresh["values"]).any()
        assert np.isnan(without["values"]).all()
        assert with_refresh["losses"] == without["losses"]
    assert one["rewards"]["values"] == other["rewards"]["values"]
    rates = dict(zip(sorted(cases.TRAINED_IDS), one["rewards"]["values"], strict=True))
    tried = {name: rate for name, rate in rates.items() if rate != 0.5}
    assert len(tried) >= 7
    assert all((rate > 0.5) == (name in cases.REWARDED_IDS) for name, rate in tried.items())
    assert set(tried.values()) == {5 / 6, 1 / 6}, "all four completions of a group count, from both ranks"
