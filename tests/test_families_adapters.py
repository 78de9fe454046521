"""Adapters and quantized layers: the gradient of the full weight, of the update that LoRA makes, and of its own matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, build, captured_gradients, close, random_samples, run_capture, weight_gradients
from oracles import dense_measures
from peft import LoraConfig, get_peft_model
from torch import nn

from selector.batching import collate
from selector.errors import ModelError
from selector.gradients.layers import layer_size
from selector.gradients.targets import find_targets, unmeasured
from selector.scorer.features import FeatureExtractor

LLAMA, PHI3, GPT2, MIXTRAL = (FAMILIES[name] for name in ("llama", "phi3", "gpt2", "mixtral"))
RANK = 3

# peft asks a model of transformers for a property under its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(base: nn.Module, modules=("q_proj", "down_proj"), **settings) -> nn.Module:
    """The base with an adapter whose matrices are both in use."""
    torch.manual_seed(1)
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=5, lora_dropout=0.3, target_modules=list(modules), **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn_like(parameter, dtype=base.dtype) / 5
    return model.eval()


def merged(model: nn.Module) -> nn.Module:
    """The same function as a model without adapters, so that autograd gives the gradient of its full weights."""
    return copy.deepcopy(model).merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_default_is_the_gradient_of_the_full_weight(settings):
    """Comparable with full fine-tuning of the merged model, for adapted layers and for the others."""
    model = adapted(build(LLAMA), **settings)
    targets = find_targets(model)
    assert [t.spec.projection for t in targets] == LLAMA.projections * 2
    samples = random_samples(9, 6)
    found = captured_gradients(model, targets, collate(samples, 0))
    for i, sample in enumerate(samples):
        gradients = weight_gradients(merged(model), sample)
        for target in targets:
            expected = gradients[target.spec.name.removeprefix("base_model.model.") + ".weight"]
            close(found[target.spec.key][i], expected)


def adapter_gradients(model, sample):
    gradients = weight_gradients(model.requires_grad_(True), sample)
    model.requires_grad_(False)
    return gradients


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_lora_pro_is_the_update_of_the_weight_that_the_adapters_gradients_make(settings):
    """s B ∇A + s ∇B A from autograd's own ∇A and ∇B; of rank 2r at most."""
    model = adapted(build(LLAMA), **settings)
    targets = find_targets(model, adapter="lora-pro")
    assert [t.spec.key for t in targets] == ["0.q", "0.down", "1.q", "1.down"]
    samples = random_samples(9, 6)
    found = captured_gradients(model, targets, collate(samples, 0))
    for i, sample in enumerate(samples):
        gradients = adapter_gradients(model, sample)
        for target in targets:
            scale = target.module.scaling["default"]
            a, b = (target.module.get_submodule(f"lora_{m}.default").weight for m in "AB")
            da, db = (gradients[f"{target.spec.name}.lora_{m}.default.weight"] for m in "AB")
            close(found[target.spec.key][i], (scale * b @ da + scale * db @ a).detach())
            assert torch.linalg.matrix_rank(found[target.spec.key][i]) <= 2 * RANK


@pytest.mark.parametrize("chosen", [PHI3, GPT2])
def test_lora_pro_of_a_fused_layer_is_split_like_its_weight(chosen):
    model = adapted(build(chosen), ("qkv_proj",) if chosen is PHI3 else ("c_attn",), fan_in_fan_out=chosen is GPT2)
    targets = find_targets(model, adapter="lora-pro")
    assert [t.spec.key for t in targets] == [f"{i}.{p}" for i in range(2) for p in "qkv"]
    (sample,) = random_samples(9)
    found = captured_gradients(model, targets, collate([sample], 0))
    gradients = adapter_gradients(model, sample)
    for layer in range(2):
        module, name = targets[3 * layer].module, targets[3 * layer].spec.name
        scale = module.scaling["default"]
        a, b = (module.get_submodule(f"lora_{m}.default").weight for m in "AB")
        da, db = (gradients[f"{name}.lora_{m}.default.weight"] for m in "AB")
        close(torch.cat([found[f"{layer}.{p}"][0] for p in "qkv"]), (scale * b @ da + scale * db @ a).detach())


def test_raw_gives_the_gradients_of_the_adapters_matrices():
    model = adapted(build(LLAMA))
    targets = find_targets(model, adapter="raw")
    assert [t.spec.key for t in targets[:4]] == ["0.q.lora_A", "0.q.lora_B", "0.down.lora_A", "0.down.lora_B"]
    assert [t.spec.key for t in find_targets(model, ["q"], adapter="raw")] == [
        f"{i}.q.lora_{m}" for i in range(2) for m in "AB"
    ]
    samples = random_samples(9, 6)
    found = captured_gradients(model, targets, collate(samples, 0))
    for i, sample in enumerate(samples):
        gradients = adapter_gradients(model, sample)
        for target in targets:
            close(found[target.spec.key][i], gradients[target.spec.name + ".weight"])


def test_features_of_lora_pro_equal_dense_spectra():
    model = adapted(build(LLAMA))
    targets = find_targets(model, adapter="lora-pro")
    (sample,) = random_samples(12)
    gradients = captured_gradients(model, targets, collate([sample], 0))
    extractor = FeatureExtractor(model, targets, "high")
    with extractor.attached():
        (row,) = extractor(collate([sample], 0))
    for i, target in enumerate(targets):
        for name, expected in dense_measures(gradients[target.spec.key][0]).items():
            assert row[name][i] == pytest.approx(expected, rel=1e-5)


def test_adapters_are_left_as_they_were():
    model = adapted(build(LLAMA)).train()
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    for adapter in ("weight", "lora-pro", "raw"):
        run_capture(model, find_targets(model, adapter=adapter), collate(random_samples(6), 0), lambda factors: None)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_layers_without_an_adapter_are_reported_where_only_adapters_are_measured():
    model = adapted(build(LLAMA))
    assert unmeasured(model, find_targets(model)) == []
    assert "base_model.model.model.layers.N.self_attn.k_proj" in unmeasured(model, find_targets(model, adapter="raw"))


def test_adapters_on_parameters_are_refused_with_the_reason():
    model = get_peft_model(
        build(MIXTRAL), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    )
    with pytest.raises(ModelError, match="adapters on parameters cannot be measured") as caught:
        find_targets(model)
    assert "target_parameters at" in str(caught.value)
    assert "its own inputs and outputs never exist" in str(caught.value)


def test_requests_that_have_no_single_answer_are_refused():
    with pytest.raises(ModelError, match="no LoRA adapter on a known layer"):
        find_targets(build(LLAMA), adapter="raw")
    with pytest.raises(ModelError, match="no plain LoRA"):
        find_targets(adapted(build(LLAMA), use_dora=True), adapter="lora-pro")
    two = adapted(build(LLAMA))
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="several adapters are active"):
        find_targets(two, adapter="raw")


# quantized bases -----------------------------------------------------------------------------------------------------


def quantized(model: nn.Module, make) -> nn.Module:
    """Every projection replaced by one with packed weights."""
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                replacement = make(bnb, child)
                replacement.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, replacement.to("cpu"))
    return model


def four_bit(bnb, child):
    return bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.float32)


def eight_bit(bnb, child):
    return bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=False, has_fp16_weights=False)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("make", "tolerance"), [(four_bit, 1e-4), (eight_bit, 3e-2)], ids=["4bit", "8bit"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_quantized_base_gives_the_gradient_of_the_weights_that_it_stands_for(make, tolerance, with_adapter):
    """Packed weights have another shape; those that they stand for are read off unit inputs. With 8 bits activations are rounded too."""
    model = quantized(build(LLAMA).float(), make)
    if with_adapter:
        model = adapted(model)
    targets = find_targets(model)
    assert len(targets) == 14
    assert {t.spec.out_features for t in targets} == {8, 16, 20}
    (sample,) = random_samples(9)
    found = captured_gradients(model, targets, collate([sample], 0))
    dense = build(LLAMA).float()
    for target in targets:
        inputs, _ = layer_size(target.module)
        unit = torch.eye(
            inputs, requires_grad=True
        )  # without gradients bitsandbytes takes a kernel that needs larger layers
        dense.get_submodule(target.spec.name.removeprefix("base_model.model.")).weight.data.copy_(target.module(unit).T)
    gradients = weight_gradients(dense, sample)
    for target in targets:
        expected = gradients[target.spec.name.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(
            found[target.spec.key][0], expected, rtol=0, atol=tolerance * float(expected.abs().max())
        )
