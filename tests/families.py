"""Tiny random models of every family, one-sample autograd over all their parameters, and captures to hold against it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from selector.batching import Batch
from selector.data.samples import Sample, TokenSequence
from selector.gradients.capture import GradientCapture, LayerFactors, gradients_of_activations_only
from selector.gradients.losses import sample_losses
from selector.gradients.targets import Target

VOCABULARY = 61
MOST_EXPERTS = 8
BASE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = BASE | {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GATED = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN = ["q", "k", "v", "o", "up", "down"]


@dataclass(frozen=True)
class Family:
    """A tiny random configuration, and the projections that each of its layers must have."""

    config: str
    settings: dict[str, Any]
    projections: list[str]


def family(name: str, config: str, settings: dict[str, Any], projections: list[str]) -> Any:
    return pytest.param(Family(config, settings, projections), id=name)


HEAD_DIM = {"head_dim": 4}
GPT = BASE | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEPARATE = [
    family("llama", "Llama", GROUPED, GATED),
    family("qwen2", "Qwen2", GROUPED, GATED),
    family("qwen3", "Qwen3", GROUPED | HEAD_DIM, GATED),
    family("gemma", "Gemma", GROUPED | HEAD_DIM, GATED),
    family("gemma2", "Gemma2", GROUPED | HEAD_DIM, GATED),
    family("gemma3", "Gemma3Text", GROUPED | HEAD_DIM, GATED),
    family("mistral", "Mistral", GROUPED, GATED),
    family("olmo2", "Olmo2", GROUPED, GATED),
    family("cohere", "Cohere", GROUPED, GATED),
    family("granite", "Granite", GROUPED, GATED),
    family("smollm3", "SmolLM3", GROUPED, GATED),
    family("stablelm", "StableLm", GROUPED, GATED),
    family("starcoder2", "Starcoder2", GROUPED, PLAIN),
    family("phi", "Phi", SIZES, PLAIN),
    family("gptj", "GPTJ", GPT | {"rotary_dim": 2, "n_inner": 20}, PLAIN),
    family("opt", "OPT", SIZES | {"ffn_dim": 20, "word_embed_proj_dim": 16}, PLAIN),
]
FUSED = [
    family("phi3", "Phi3", GROUPED, GATED),
    family("glm4", "Glm4", GROUPED | HEAD_DIM, GATED),
    family("gpt2", "GPT2", GPT, PLAIN),
    family("gpt_neox", "GPTNeoX", SIZES, PLAIN),
    family("bloom", "Bloom", BASE | {"hidden_size": 16, "n_layer": 2, "n_head": 4}, PLAIN),
    family("falcon_multi_query", "Falcon", SIZES | {"multi_query": True}, PLAIN),
    family("falcon_many_heads", "Falcon", SIZES | {"multi_query": False, "new_decoder_architecture": False}, PLAIN),
    family("falcon_new", "Falcon", SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}, PLAIN),
]
LATENT = {
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "num_key_value_heads": 4,
}
EXPERTS = ["expert_gate", "expert_up", "expert_down"]
ROUTED = [
    family("mixtral", "Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, ["q", "k", "v", "o", *EXPERTS]),
    family(
        "qwen3_moe", "Qwen3Moe", GROUPED | HEAD_DIM | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
        ["q", "k", "v", "o", *EXPERTS],
    ),
    family(
        "qwen2_moe_with_shared_experts", "Qwen2Moe",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7},
        [*GATED, *EXPERTS],
    ),
    family(
        "gpt_oss", "GptOss", GROUPED | HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        ["q", "k", "v", "o", *EXPERTS],
    ),
    family("olmoe", "Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, ["q", "k", "v", "o", *EXPERTS]),
    family(
        "deepseek_v3", "DeepseekV3",
        SIZES | LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 6, "n_shared_experts": 1,
                              "first_k_dense_replace": 0},
        [*GATED, *EXPERTS, "q_a", "kv_a"],
    ),
]  # fmt: skip

FAMILIES: dict[str, Family] = {str(parameter.id): parameter.values[0] for parameter in (*SEPARATE, *FUSED, *ROUTED)}


def build(chosen: Family) -> nn.Module:
    """A float64 model with random weights everywhere, biases included."""
    torch.manual_seed(0)
    config = getattr(transformers, chosen.config + "Config")(**chosen.settings)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_samples(*lengths: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    samples = []
    for i, length in enumerate(lengths):
        mask = np.arange(length) >= length // 3
        sequence = TokenSequence(
            generator.integers(3, VOCABULARY, length).astype(np.int32), mask & (np.arange(length) > 0)
        )
        samples.append(Sample(f"s{i}", i, None, (sequence,)))
    return samples


def weight_gradients(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """Gradients of all parameters for one sample alone, by plain autograd."""
    twin = copy.deepcopy(model)
    tokens = torch.tensor(sample.sequences[0].input_ids[None].astype("int64"))
    mask = torch.tensor(sample.sequences[0].loss_mask[1:])
    logits = twin(input_ids=tokens).logits
    F.cross_entropy(logits[0, :-1][mask], tokens[0, 1:][mask]).backward()
    return {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in twin.named_parameters(remove_duplicate=False)
    }


def run_capture(
    model: nn.Module, targets: list[Target], batch: Batch, consumer: Callable[[LayerFactors], None], **options: Any
) -> None:
    with gradients_of_activations_only(model), GradientCapture(model, targets, consumer, **options) as capture:
        capture.begin(samples=len(batch.samples))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        sample_losses(logits, batch).sum().backward()
        capture.finish()


def captured_gradients(model: nn.Module, targets: list[Target], batch: Batch, **options: Any) -> dict[str, Tensor]:
    """ΔᵀX by key as [N, O, I]; of routed experts as [N, E, O, I]."""
    found: dict[str, Tensor] = {}

    def keep(factors: LayerFactors) -> None:
        for spec, delta in zip(factors.specs, factors.deltas, strict=True):
            gradient = torch.einsum("nto,nti->noi", delta, factors.x)
            assert tuple(gradient.shape[1:]) == (spec.out_features, spec.in_features)
            if factors.experts is None:
                assert spec.key not in found, "handed over twice"
                found[spec.key] = gradient
            else:
                shape = (len(batch.samples), MOST_EXPERTS, *gradient.shape[1:])
                table = found.setdefault(spec.key, gradient.new_zeros(shape))
                assert not table[factors.experts.sample, factors.experts.expert].any(), "handed over twice"
                table[factors.experts.sample, factors.experts.expert] = gradient

    run_capture(model, targets, batch, keep, **options)
    return found


def parameters_of(target: Target) -> list[str]:
    """Names of the parameters that hold the weight that a target belongs to: several for experts in a list."""
    if target.stack is None:
        return [f"{target.spec.name}.weight"]
    if isinstance(target.module, nn.ModuleList):
        return [f"{target.spec.name}.{expert}.{target.stack.name}.weight" for expert in range(len(target.module))]
    return [f"{target.spec.name}.{target.stack.name}"]


def full_gradient(target: Target, gradients: dict[str, Tensor]) -> Tensor:
    """The autograd gradient of the whole weight that a target belongs to, outputs before inputs."""
    found = [gradients[name] for name in parameters_of(target)]
    gradient = torch.stack(found) if isinstance(target.module, nn.ModuleList) else found[0]
    return gradient.mT if stored_transposed(target) else gradient


def stored_transposed(target: Target) -> bool:
    """Whether the weight is kept as inputs before outputs."""
    return type(target.module).__name__ == "Conv1D" or getattr(target.module, "is_transposed", False)


def assembled(targets: list[Target], found: dict[str, Tensor], sample: int, like: Tensor) -> Tensor:
    """Parts put back at the columns that they came from; every output belongs to exactly one part."""
    whole = torch.full_like(like, float("nan"))
    for target in targets:
        part = found[target.spec.key][sample][..., :]
        part = part[: len(like)] if target.stack else part
        rows = (
            torch.arange(like.shape[-2]) if target.columns is None else target.columns.of(torch.arange(like.shape[-2]))
        )
        assert whole[..., rows, :].isnan().all()
        whole[..., rows, :] = part
    return whole


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the float32 that some families compute angles and attention in, whatever the model's format."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def by_weight(targets: list[Target]) -> Iterator[list[Target]]:
    groups: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.spec.name, target.stack.name if target.stack else ""), []).append(target)
    yield from groups.values()
