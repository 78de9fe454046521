"""A wrong number is never written: models that mix samples, dropout, patched passes and too many failures are refused."""

from __future__ import annotations

import types

import datasets
import numpy as np
import pytest
import torch

from selector.cli.score import summarize
from selector.config import ScoreConfig
from selector.data.samples import Encoder, Sample
from selector.errors import ModelError, NumericalError
from selector.scorer import score_dataset
from selector.scorer.checks import self_test
from selector.types import MEASURES


@pytest.fixture
def samples(tokenizer, pool) -> list[Sample]:
    rows = [{"prompt": r["prompt"], "completion": r["completion"]} for r in pool.select(range(5))]
    return list(Encoder(tokenizer, 512, "error").encode(rows, [str(i) for i in range(5)], [None] * 5))


def test_model_whose_samples_depend_on_each_other_is_refused_with_the_numbers(small_llama, tokenizer, pool, tmp_path):
    class MeanOverBatch(torch.nn.Module):
        def forward(self, x):
            return x - 0.1 * x.mean(dim=0, keepdim=True)

    small_llama.model.norm = torch.nn.Sequential(small_llama.model.norm, MeanOverBatch())
    with pytest.raises(NumericalError, match="depends on its batch mates") as caught:
        score_dataset(small_llama, tokenizer, pool.select(range(4)), tmp_path / "s")
    assert "relative difference" in str(caught.value)
    assert "0.0001 for a float32 model" in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        ("everything 0.05 % longer", None),
        ("everything 0.2 % longer", "the length of the whole gradient"),
        ("one layer 0.1 % longer", "frobenius_norm"),
        ("one spectrum 0.1 % flatter", "nuclear_norm"),
        ("as many times longer as there are samples", "the length of the whole gradient"),
    ],
)
def test_what_the_self_test_lets_pass_is_a_common_factor_near_one(samples, fault, refused):
    """Logits that rounding moves by 5e-4 scale the gradient of a sure token by as much; nothing else may differ so far."""
    rng = np.random.default_rng(0)
    features = {name: rng.uniform(1, 2, 14).astype(np.float32) for name in MEASURES}

    def extract(batch):
        found = {name: values.astype(np.float64) for name, values in features.items()}
        if len(batch) > 1:
            for name in MEASURES[1:]:
                found[name] *= {"everything 0.05 % longer": 1.0005, "everything 0.2 % longer": 1.002}.get(fault, 1.0)
                found[name][3] *= 1.001 if fault == "one layer 0.1 % longer" else 1.0
                found[name] *= len(batch) if "as many" in fault else 1.0
            found["nuclear_norm"][3] *= 1.001 if "flatter" in fault else 1.0
        return [{"status": "ok", "loss": 0.5} | found for _ in batch]

    if refused is None:
        assert self_test(extract, samples, list, torch.float32) == pytest.approx(5e-4, rel=1e-2)
    else:
        with pytest.raises(NumericalError, match=f"self-test: {refused} of sample"):
            self_test(extract, samples, list, torch.float32)


@pytest.mark.parametrize("share", [0.1, 0.003])
def test_a_small_leak_between_samples_is_refused(small_llama, tokenizer, pool, tmp_path, share):
    """Attention's output with a little of the mean over the batch."""
    layer = small_llama.model.layers[0].self_attn
    layer.register_forward_hook(lambda m, i, o: (o[0] - share * o[0].mean(dim=0, keepdim=True), *o[1:]))
    with pytest.raises(NumericalError, match="depends on its batch mates"):
        score_dataset(small_llama, tokenizer, pool.select(range(4)), tmp_path / "s")


def test_hidden_dropout_is_refused(small_llama, tokenizer, pool, tmp_path):
    class Dropout(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.1, training=True)

    small_llama.model.norm = torch.nn.Sequential(small_llama.model.norm, Dropout())
    with pytest.raises(NumericalError, match="self-test"):
        score_dataset(small_llama, tokenizer, pool.select(range(4)), tmp_path / "s")


def test_bfloat16_model_passes_the_self_test(small_llama, tokenizer, pool, tmp_path):
    assert len(score_dataset(small_llama.bfloat16(), tokenizer, pool.select(range(4)), tmp_path / "s")) == 4


@pytest.mark.parametrize("library", ["liger_kernel", "unsloth"])
def test_patched_forward_passes_are_refused(small_llama, tokenizer, pool, tmp_path, library):
    def forward(self, hidden_states):
        return hidden_states

    forward.__module__ = f"{library}.transformers.rms_norm"
    small_llama.model.layers[1].input_layernorm.forward = types.MethodType(
        forward, small_llama.model.layers[1].input_layernorm
    )
    with pytest.raises(ModelError, match="has replaced forward passes") as caught:
        score_dataset(small_llama, tokenizer, pool.select(range(2)), tmp_path / "s")
    assert "model.layers.1.input_layernorm" in str(caught.value)


def test_exit_code_says_when_too_many_samples_failed(small_llama, tokenizer, pool, tmp_path, capsys):
    rows = [dict(pool[i]) for i in range(5)]
    rows[2]["completion"] = ""
    data = datasets.Dataset.from_list(rows)
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(max_failed=0.5))
    assert summarize(store, 0.5) == 0
    assert summarize(store, 0.01) == 3
    assert "1 of 5 samples have no score" in capsys.readouterr().err
