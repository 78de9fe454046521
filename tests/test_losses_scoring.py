"""Stores of preference pairs and of rollouts: which loss is taken, against which reference, of which unit."""

from __future__ import annotations

import copy
import json
import math

import datasets
import numpy as np
import pytest
import torch

from selector.config import ScoreConfig
from selector.data.rollouts import one_row_per_rollout
from selector.errors import DataError, StoreError
from selector.scorer import score_dataset

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def pairs() -> datasets.Dataset:
    rows = [
        {"prompt": f"Count to {n}:", "chosen": " " + " ".join(WORDS[:n]), "rejected": " no" + " no" * (n % 3)}
        for n in range(1, 7)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def groups() -> datasets.Dataset:
    rows = [
        {
            "prompt": f"Count to {n}:",
            "completions": [" ".join(WORDS[: n + k]) for k in range(3)],
            "advantages": [1.0, -0.5, -0.5],
        }
        for n in range(1, 5)
    ]
    rows += [{"prompt": "Say:", "completions": ["a", "b", "c"], "advantages": [0.0, 0.0, 0.0]}]
    # a group that lost a rollout is batched apart from the whole ones
    rows += [{"prompt": "Say it:", "completions": ["a b", "b"], "advantages": [0.7, -0.7]}]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def other(small_llama):
    torch.manual_seed(1)
    model = copy.deepcopy(small_llama)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def test_pairs_are_scored_by_their_dpo_loss_against_the_model_itself(small_llama, tokenizer, pairs, tmp_path, caplog):
    caplog.set_level("INFO", logger="selector")
    table = (
        score_dataset(small_llama, tokenizer, pairs, tmp_path / "s")
        .to_arrow(["status", "loss", "n_loss_tokens"])
        .to_pydict()
    )
    assert table["status"] == ["ok"] * len(pairs)
    assert table["loss"] == pytest.approx([math.log(2)] * len(pairs))
    assert "loss = dpo" in caplog.text
    assert "the model itself, as at the start of training" in caplog.text


def test_a_reference_model_gives_what_its_stored_log_probabilities_give(small_llama, other, tokenizer, pairs, tmp_path):
    from selector.batching import collate
    from selector.data.samples import Encoder
    from selector.gradients.losses import reference_log_probs

    by_model = score_dataset(small_llama, tokenizer, pairs, tmp_path / "model", reference=other)
    samples = list(Encoder(tokenizer, 512, "error", "dpo").encode(pairs, [""] * len(pairs), [None] * len(pairs)))
    chosen, rejected = torch.stack([reference_log_probs(other, collate([sample], 3)) for sample in samples]).T.tolist()
    stored = pairs.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)
    by_column = score_dataset(small_llama, tokenizer, stored, tmp_path / "columns")
    for name in ("loss", "nuclear_norm"):
        first, second = (np.array(store.to_arrow([name])[name].to_pylist()) for store in (by_model, by_column))
        np.testing.assert_allclose(first, second, rtol=1e-4)
    with pytest.raises(DataError, match="there are two references"):
        score_dataset(small_llama, tokenizer, stored, tmp_path / "both", reference=other)
    with pytest.raises(DataError, match="a reference model has no effect"):
        score_dataset(small_llama, tokenizer, pairs, tmp_path / "none", ScoreConfig(loss="chosen"), reference=other)
    with pytest.raises(StoreError, match="reference"):
        score_dataset(small_llama, tokenizer, pairs, tmp_path / "model")


def test_a_group_without_variance_has_a_status_and_is_no_failure(small_llama, tokenizer, groups, tmp_path):
    store = score_dataset(small_llama, tokenizer, groups, tmp_path / "s")
    table = store.to_arrow(["row", "status", "effective_rank"]).sort_by("row").to_pydict()
    assert table["status"] == ["ok"] * 4 + ["zero_gradient", "ok"]
    assert set(table["effective_rank"][4]) == {None}


@pytest.mark.parametrize("normalizer", ["dapo", "grpo", "dr_grpo"])
def test_a_rollout_alone_has_the_spectrum_of_its_own_likelihood(small_llama, tokenizer, groups, tmp_path, normalizer):
    config = ScoreConfig(unit="rollout", normalizer=normalizer, max_length=256)
    store = score_dataset(small_llama, tokenizer, groups, tmp_path / "s", config)
    table = (
        store.to_arrow(["row", "status", "effective_rank", "nuclear_norm", "n_loss_tokens"]).sort_by("row").to_pydict()
    )
    assert table["status"] == ["ok"] * 12 + ["zero_gradient"] * 3 + ["ok"] * 2
    flat = [{"prompt": g["prompt"], "completion": c} for g in groups for c in g["completions"]]
    plain = score_dataset(small_llama, tokenizer, datasets.Dataset.from_list(flat), tmp_path / "p")
    expected = plain.to_arrow(["row", "effective_rank", "nuclear_norm"]).sort_by("row").to_pydict()
    advantages = [a for g in groups for a in g["advantages"]]
    for i, advantage in enumerate(advantages):
        if advantage == 0:
            continue
        scale = abs(advantage) * (table["n_loss_tokens"][i] / 256 if normalizer == "dr_grpo" else 1)
        np.testing.assert_allclose(table["effective_rank"][i], expected["effective_rank"][i], rtol=1e-3)
        np.testing.assert_allclose(table["nuclear_norm"][i], scale * np.array(expected["nuclear_norm"][i]), rtol=1e-3)


def test_the_unit_is_recorded_with_the_rows_that_it_means(small_llama, tokenizer, groups, tmp_path):
    store = score_dataset(small_llama, tokenizer, groups, tmp_path / "s", ScoreConfig(unit="rollout"))
    identity = json.loads((store.path / "manifest.json").read_text())["identity"]
    assert (identity["unit"], identity["format"], identity["loss"]) == ("rollout", "rollout", "policy-gradient")
    from selector.data.layout import recognize

    flat = one_row_per_rollout(groups, recognize(groups.column_names, ScoreConfig()))
    assert len(store.to_arrow(["row"])) == len(flat)
    same = score_dataset(small_llama, tokenizer, flat, tmp_path / "flat")
    assert sorted(same.to_arrow(["sample_id"])["sample_id"].to_pylist()) == sorted(
        store.to_arrow(["sample_id"])["sample_id"].to_pylist()
    )


@pytest.mark.parametrize("change", [{"loss": "chosen"}, {"beta": 0.5}])
def test_another_loss_is_refused_by_a_store_that_was_begun(small_llama, tokenizer, pairs, tmp_path, change):
    score_dataset(small_llama, tokenizer, pairs, tmp_path / "s", ScoreConfig(limit=3))
    with pytest.raises(StoreError, match=next(iter(change))):
        score_dataset(small_llama, tokenizer, pairs, tmp_path / "s", ScoreConfig(**change))
