"""Which layers are found and under which role: names of users, other towers, and what is left out."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    GPT,
    GROUPED,
    HEAD_DIM,
    build,
    captured_gradients,
    close,
    random_samples,
    weight_gradients,
)
from torch import nn

from selector.batching import collate
from selector.config import ScoreConfig
from selector.errors import ConfigError, ModelError
from selector.gradients.names import role_of
from selector.gradients.targets import find_targets, unmeasured

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("attn.c_proj", "o"), ("mlp.c_proj", "down"), ("self_attn.dense", "o"), ("fc1", "up"), ("out_proj", "o"), ("c_proj", None),
        ("linear_attn.out_proj", None), ("mamba.out_proj", None), ("cross_attn.q_proj", None), ("mlp.experts.3.up_proj", None),
        ("mlp.shared_expert.gate_proj", "gate"), ("mlp.gate", None), ("attn.attention.out_proj", "o"), ("feed_forward.up_proj", "up"),
    ],
)  # fmt: skip
def test_role_follows_from_the_name_and_its_parent(path, role):
    assert role_of(path) == role


class Other(nn.Module):
    """A model whose layers have names that no family uses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(8, 8), "wide": nn.Linear(8, 12), "gain": nn.LayerNorm(8)}) for _ in range(3)
        )


def test_user_names_layers_by_pattern():
    targets = find_targets(Other(), names=["o=blocks.*.mix", "my_role=*.wide"])
    assert [t.spec.key for t in targets] == [f"{i}.{role}" for i in range(3) for role in ("o", "my_role")]
    assert targets[1].spec.out_features == 12
    assert [t.spec.key for t in find_targets(Other(), ["my_role"], [-1], names=["my_role=*.wide"])] == ["2.my_role"]


def test_model_without_known_names_says_what_it_has_and_how_to_name_it():
    with pytest.raises(ModelError, match="Other has no projection that is known by name") as caught:
        find_targets(Other())
    assert "blocks.N.mix, blocks.N.wide" in str(caught.value)
    assert "--layer-names role=pattern" in str(caught.value)


def test_partly_known_model_tells_what_is_not_measured():
    model = Other()
    assert unmeasured(model, find_targets(model, names=["o=*.mix"])) == ["blocks.N.wide"]
    llama = build(LLAMA)
    assert unmeasured(llama, find_targets(llama)) == []
    assert unmeasured(llama, find_targets(llama, ["q"])) == [
        f"model.layers.N.{name}"
        for name in (
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "self_attn.v_proj",
        )
    ]


def test_all_bad_names_are_reported_at_once():
    with pytest.raises(ConfigError, match="2 problems") as caught:
        find_targets(Other(), names=["Bad=*.mix", "o=*.nothing", "up=*.wide"])
    assert "Bad=*.mix" in str(caught.value)
    assert "matches no linear layer" in str(caught.value)


def test_one_role_twice_in_a_layer_is_refused():
    with pytest.raises(ModelError, match="two layers have the same role") as caught:
        find_targets(Other(), names=["o=*.mix", "o=*.wide"])
    assert "blocks.0.wide and blocks.0.mix" in str(caught.value)


def test_unknown_projections_and_layers_are_refused_together():
    with pytest.raises(ModelError) as caught:
        find_targets(build(LLAMA), ["gat"], [2])
    assert "did you mean 'gate'?" in str(caught.value)
    assert "-2 ... 1" in str(caught.value)


def test_fused_layer_of_an_unknown_layout_is_measured_whole():
    """One name stands for several layouts: a wrong split would be a wrong number."""
    model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT)).double().eval()
    targets = find_targets(model)
    assert [t.spec.projection for t in targets] == ["o", "up", "down", "qkv"] * 2
    (sample,) = random_samples(6)
    found = captured_gradients(model, targets, collate([sample], 0))
    close(found["1.qkv"][0], weight_gradients(model, sample)["transformer.h.1.attn.c_attn.weight"])


def test_only_the_text_decoder_of_a_model_with_a_vision_tower_is_measured():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=GROUPED | HEAD_DIM,
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    targets = find_targets(model)
    assert len(targets) == 14
    assert all("language_model" in target.spec.name for target in targets)
    (sample,) = random_samples(6)
    found = captured_gradients(model, targets, collate([sample], 0))
    close(found["0.up"][0], weight_gradients(model, sample)[targets[5].spec.name + ".weight"])


def test_tied_output_embedding_is_no_target():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    assert not any("lm_head" in target.spec.name or "embed" in target.spec.name for target in find_targets(model))


def test_model_base_without_a_head_is_measured_too():
    model = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED))
    assert [t.spec.name for t in find_targets(model, ["q"])] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
    ]


def test_settings_are_part_of_a_stores_identity():
    identity = ScoreConfig(layer_names=("o=*.mix",), adapter="raw").identity()
    assert (identity["layer_names"], identity["adapter"], identity["projections"]) == (["o=*.mix"], "raw", [])
