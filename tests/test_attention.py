"""Sequences joined without padding: with every attention they give what padded ones give, or the model is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, build, random_samples
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from selector.assets import POOL, TINY_MODEL
from selector.batching import Batch, collate, join
from selector.cli import main
from selector.config import ScoreConfig
from selector.errors import ModelError
from selector.gradients.targets import find_targets
from selector.scorer import attention, load_model, score_dataset
from selector.scorer.attention import joining_problems
from selector.scorer.features import FeatureExtractor
from selector.scorer.models import missing_attention
from selector.types import MEASURES

MIXING = ("opt", "bloom", "gpt_oss")
"""Families that make their mask without the positions, at least in some releases of transformers."""


def features_of(model, batch: Batch) -> dict[str, np.ndarray]:
    extractor = FeatureExtractor(model, find_targets(model), "high")
    with extractor.attached():
        rows = extractor(batch)
    return {name: np.stack([row[name] for row in rows]) for name in MEASURES}


def assert_equal_or_refused(model) -> bool:
    """Whether joined and padded samples have equal features; a model whose samples mix must have been refused."""
    samples = random_samples(11, 5, 9)
    padded, joined = features_of(model, collate(samples, 0)), features_of(model, join(samples))
    equal = all(np.allclose(joined[name], padded[name], rtol=1e-5, equal_nan=True) for name in MEASURES)
    assert equal == (joining_problems(model) == [])
    return equal


@pytest.mark.parametrize("name", list(FAMILIES))
def test_joined_samples_have_the_features_of_padded_ones_or_the_model_is_refused(name):
    model = build(FAMILIES[name])
    for implementation in ("eager", "sdpa"):
        if implementation == "eager" or model._supports_sdpa:
            model.set_attn_implementation(implementation)
            assert assert_equal_or_refused(model) or name in MIXING


# flash attention -----------------------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: int | None, softcap: float
) -> Tensor:
    """Attention of one sequence in plain torch: [T, H, D], with fewer heads in k and v where they are shared."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * (scale if scale is not None else q.shape[2] ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    behind = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (behind >= 0) | torch.tensor(not causal)
    if window is not None and window >= 0:
        seen &= behind <= window
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.fixture
def borders(monkeypatch) -> list[list[int]]:
    """Put plain torch in place of the flash kernels, behind the code of transformers that calls them.

    Returns:
        What they were told of where sequences begin and end, call by call.
    """
    if not hasattr(flash, "_flash_with_kvcache_fn"):
        pytest.skip("this release of transformers takes other sets of kernels")
    told: list[list[int]] = []

    def variable(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        ends = cu_seqlens_q.tolist()
        assert ends == cu_seqlens_k.tolist()
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(ends))
        assert dropout_p == 0
        told.append(ends)
        pieces = zip(*(x.split([b - a for a, b in pairwise(ends)]) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*piece, softmax_scale, causal, window_size[0], softcap) for piece in pieces])

    def fixed(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        assert dropout_p == 0
        return torch.stack(
            [attend(*row, softmax_scale, causal, window_size[0], softcap) for row in zip(q, k, v, strict=True)]
        )

    functions = (fixed, variable, None, flash._pad_input, flash._unpad_input)
    prepare = flash._lazy_define_process_function(variable)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, (prepare, prepare)))
    return told


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt_neox", "mixtral", "opt"]
)
def test_joined_samples_under_flash_attention_have_the_features_of_padded_ones_under_eager(name, borders):
    model, samples = build(FAMILIES[name]), random_samples(11, 5, 9)
    expected = features_of(model, collate(samples, 0))
    model.config._attn_implementation = "flash_attention_2"
    joined = features_of(model, join(samples))
    assert borders == [[0, 11, 16, 25]] * len(borders)
    assert borders
    for measure in MEASURES:
        np.testing.assert_allclose(joined[measure], expected[measure], rtol=1e-5)
    padded = features_of(model, collate(samples, 0))
    for measure in MEASURES:
        np.testing.assert_allclose(padded[measure], expected[measure], rtol=1e-5)
    assert joining_problems(model) == []


def test_padding_free_run_with_flash_attention_gives_the_store_of_a_padded_run(
    small_llama, tokenizer, pool, tmp_path, borders
):
    data = pool.select(range(8))
    expected = score_dataset(small_llama, tokenizer, data, tmp_path / "padded")
    small_llama.config._attn_implementation = "flash_attention_2"
    found = score_dataset(small_llama, tokenizer, data, tmp_path / "joined", ScoreConfig(padding_free=True))
    assert max(map(len, borders)) > 2
    for measure in MEASURES:
        np.testing.assert_allclose(found.features(measure), expected.features(measure), rtol=1e-5)


def test_flash_attention_that_is_not_told_of_the_borders_is_refused(monkeypatch, borders):
    """A release, or a model, that drops the positions on the way."""
    model = build(FAMILIES["llama"])
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda *_: False)
    (problem,) = joining_problems(model)
    assert "does not keep apart sequences" in str(problem)


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch) -> str:
    """An attention of somebody's own: whether it looks at positions, nobody knows."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", lambda *a, **k: None)
    return "mine"


def test_attention_that_is_not_known_is_refused_without_padding_and_before_anything_is_read(
    small_llama, tokenizer, pool, tmp_path, foreign
):
    small_llama.config._attn_implementation = foreign
    with pytest.raises(ModelError, match="not known to keep sequences apart") as caught:
        score_dataset(small_llama, tokenizer, pool.select(range(3)), tmp_path / "s", ScoreConfig(padding_free=True))
    assert (caught.value.got, caught.value.allowed) == ("mine", attention.ALLOWED)
    assert "--padding-free" in str(caught.value.fix)
    assert not (tmp_path / "s").exists()


def test_a_known_name_with_another_function_behind_it_is_refused(small_llama, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: None)
    assert small_llama.config._attn_implementation == "sdpa"
    (problem,) = joining_problems(small_llama)
    assert problem.got == "sdpa"


def opt(tokenizer) -> transformers.OPTForCausalLM:
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 20,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=512)
    )


def test_model_and_reference_that_mix_joined_sequences_are_refused(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(3))
    mixing = opt(tokenizer)
    if not joining_problems(mixing):
        pytest.skip("this release of transformers gives the positions to OPT's mask")
    with pytest.raises(ModelError, match="OPTForCausalLM with sdpa does not keep apart") as caught:
        score_dataset(mixing, tokenizer, data, tmp_path / "s", ScoreConfig(padding_free=True))
    assert caught.value.fix == "leave out --padding-free"
    pairs = data.map(lambda row: {"chosen": row["completion"], "rejected": "No."}).remove_columns("completion")
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        score_dataset(
            small_llama, tokenizer, pairs, tmp_path / "s", ScoreConfig(padding_free=True, loss="dpo"), reference=mixing
        )
    assert not (tmp_path / "s").exists()
    assert len(score_dataset(mixing, tokenizer, data, tmp_path / "padded")) == 3


def test_attention_that_is_not_installed_is_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    arguments = [
        "--model",
        str(TINY_MODEL),
        "--data",
        str(POOL),
        "--out",
        str(tmp_path / "s"),
        "--attention",
        "flash_attention_2",
    ]
    assert main(["score", *arguments]) == 2
    said = capsys.readouterr().err
    for part in (
        "flash_attention_2 is not installed",
        "no module flash_attn",
        "allowed: auto, eager, sdpa",
        "leave out --attention",
    ):
        assert part in said
    assert not (tmp_path / "s").exists()
    assert missing_attention("auto") == missing_attention("sdpa") == []


def test_attention_is_a_choice_that_changes_no_identity():
    model, _ = load_model(str(TINY_MODEL), attention="eager")
    assert model.config._attn_implementation == "eager"
    assert "attention" not in ScoreConfig().identity()
