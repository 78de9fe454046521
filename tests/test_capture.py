"""What the hooks hold, when they let go of it, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import (
    FAMILIES,
    GROUPED,
    HEAD_DIM,
    SIZES,
    build,
    captured_gradients,
    close,
    random_samples,
    run_capture,
    weight_gradients,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from selector.batching import collate
from selector.errors import ModelError
from selector.gradients.capture import GradientCapture, gradients_of_activations_only
from selector.gradients.layers import LayerType, consecutive, layer_types
from selector.gradients.losses import sample_losses
from selector.gradients.targets import find_targets
from selector.gradients.tokens import TokenMap
from selector.testing import ContractError, check_layer_type

LLAMA, MIXTRAL = FAMILIES["llama"], FAMILIES["mixtral"]


@pytest.fixture
def llama():
    return build(LLAMA)


@pytest.fixture
def batch():
    return collate(random_samples(9, 6), 0)


def equal(found, expected) -> None:
    assert set(found) == set(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


# activation checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj", "opt", "gemma3"])
def test_recomputed_activations_give_the_same_gradients(name, batch):
    model = build(FAMILIES[name])
    targets = find_targets(model)
    equal(captured_gradients(model, targets, batch, checkpoint=True), captured_gradients(model, targets, batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_models_own_checkpointing_gives_the_same_gradients(llama, batch, reentrant):
    """As a trainer has it: training mode, no dropout in the configuration."""
    targets = find_targets(llama)
    expected = captured_gradients(llama, targets, batch)
    llama.train().gradient_checkpointing_enable.__self__._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=lambda *a, **k: checkpoint(*a, use_reentrant=reentrant, **k)
    )
    llama.enable_input_require_grads()
    found = {}

    def keep(factors):
        for spec, delta in zip(factors.specs, factors.deltas, strict=True):
            found[spec.key] = torch.einsum("nto,nti->noi", delta, factors.x)

    with GradientCapture(llama, targets, keep) as capture:
        capture.begin(samples=2)
        sample_losses(
            llama(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits, batch
        ).sum().backward()
        capture.finish()
    equal(found, expected)


def most_inputs_held(model, batch, with_cache=False, **options) -> int:
    """Largest number of layer inputs that the capture holds when it hands over factors, the ones in hand included."""
    most = 0

    def count(factors):
        nonlocal most
        most = max(most, 1 + sum(held.x is not None for held in capture._inputs))

    with gradients_of_activations_only(model), GradientCapture(model, find_targets(model), count, **options) as capture:
        capture.begin(samples=2)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=with_cache).logits
        sample_losses(logits, batch).sum().backward()
        capture.finish()
    return most


def test_recomputation_holds_the_inputs_of_one_layer_at_a_time(batch):
    """Six layers of four inputs each: q, k and v share one, gate and up another."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 6})).eval()
    assert most_inputs_held(model, batch) == 6 * 4
    assert most_inputs_held(model, batch, checkpoint=True) <= 4
    assert most_inputs_held(model, batch, checkpoint=True, with_cache=True) <= 4


def test_dropout_is_off_where_activations_are_recomputed(batch):
    config = transformers.OPTConfig(
        **SIZES, ffn_dim=20, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).double().train()
    targets = find_targets(model)
    equal(
        captured_gradients(model, targets, batch, checkpoint=True),
        captured_gradients(model, targets, batch, checkpoint=True),
    )
    equal(captured_gradients(model, targets, batch, checkpoint=True), captured_gradients(model, targets, batch))


# restoring -----------------------------------------------------------------------------------------------------------


def snapshot(model) -> dict[str, tuple]:
    return {
        name: (
            module.training,
            dict(module.__dict__.items()).keys(),
            len(module._forward_hooks),
            module.__dict__.get("forward"),
            module.forward.__func__,
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("chosen", [LLAMA, MIXTRAL])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(chosen, fails, batch):
    model = build(chosen).train()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before, required = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    implementation = model.config._experts_implementation

    def consumer(factors):
        if fails:
            raise RuntimeError("consumer")

    if fails:
        with pytest.raises(RuntimeError, match="consumer"):
            run_capture(model, find_targets(model), batch, consumer, checkpoint=True)
    else:
        run_capture(model, find_targets(model), batch, consumer, checkpoint=True)
    assert snapshot(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())
    assert model.config._experts_implementation == implementation


def test_nothing_is_held_after_a_batch(llama, batch):
    with (
        gradients_of_activations_only(llama),
        GradientCapture(llama, find_targets(llama), lambda factors: None) as capture,
    ):
        capture.begin(samples=2)
        sample_losses(llama(batch.input_ids, attention_mask=batch.attention_mask).logits, batch).sum().backward()
        capture.finish()
        assert not capture._inputs
        assert not capture._calls


def test_passes_outside_of_batches_go_unnoticed(llama, batch):
    """A trainer's own steps and evaluations between the measured ones."""
    with (
        gradients_of_activations_only(llama),
        GradientCapture(llama, find_targets(llama), lambda factors: pytest.fail("handed over")) as capture,
    ):
        for _ in range(2):
            sample_losses(llama(batch.input_ids, attention_mask=batch.attention_mask).logits, batch).sum().backward()
        assert not capture._inputs


# hooks that do not run -----------------------------------------------------------------------------------------------


def test_layer_whose_hooks_do_not_run_is_named(llama, batch):
    """As fused kernels do it: the weights are used without calling the modules."""
    mlp = llama.model.layers[1].mlp
    mlp.forward = lambda x: F.linear(
        F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight), mlp.down_proj.weight
    )
    with pytest.raises(ModelError, match="hooks did not run") as caught:
        captured_gradients(llama, find_targets(llama), batch)
    assert "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, model.layers.1.mlp.down_proj" in str(caught.value)
    assert "layers.0" not in str(caught.value)


def test_inputs_that_are_overwritten_in_place_are_refused(llama, batch):
    """Without weight gradients autograd does not keep the inputs, and does not complain either."""
    seen = []

    def overwrite(module, inputs, output):
        seen.pop().zero_()

    mlp = llama.model.layers[1].mlp
    mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    mlp.register_forward_hook(overwrite)
    with pytest.raises(ModelError, match="overwritten before they could be measured") as caught:
        captured_gradients(llama, find_targets(llama), batch)
    assert "model.layers.1.mlp.down_proj" in str(caught.value)


def test_targets_of_another_model_are_noticed(llama, batch):
    other = build(LLAMA)
    with pytest.raises(ModelError, match="hooks did not run"):
        captured_gradients(llama, find_targets(other), batch)


def test_layer_without_gradient_is_no_failure(llama, batch):
    """Gradients stop at a detached residual stream: what lies before it ran, and has none."""
    llama.model.layers[1].register_forward_pre_hook(
        lambda module, inputs: (inputs[0].detach().requires_grad_(True), *inputs[1:])
    )
    found = captured_gradients(llama, find_targets(llama), batch)
    assert {key.partition(".")[0] for key in found} == {"1"}


def test_compiled_layers_that_ran_before_are_measured_all_the_same(llama, batch):
    """A compiled graph leaves out hooks that come after it; both ways of compiling."""
    expected = captured_gradients(llama, find_targets(llama), batch)
    llama.model.layers[0].compile(backend="eager")
    llama.model.layers[1] = torch.compile(llama.model.layers[1], backend="eager")
    with torch.no_grad():
        llama(input_ids=batch.input_ids)
    equal(captured_gradients(llama, find_targets(llama), batch), expected)
    torch.compiler.reset()


def test_layer_that_runs_twice_is_refused(llama, batch):
    llama.model.layers[1] = llama.model.layers[0]
    with pytest.raises(ModelError, match="used twice in one pass") as caught:
        captured_gradients(llama, find_targets(llama), batch)
    assert "model.layers.0." in str(caught.value)


# samples and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [LLAMA, MIXTRAL])
def test_joined_sequences_give_the_gradients_of_padded_ones(chosen):
    """One row without padding, positions starting anew, a mask that keeps sequences apart; the second sample has two segments."""
    model = build(chosen)
    samples = random_samples(7, 12, 5)
    targets = find_targets(model)
    expected = captured_gradients(model, targets, collate(samples, 0))
    sequences = [sample.sequences[0] for sample in samples]
    order = [1, 0, 2]
    tokens = torch.tensor([int(t) for i in order for t in sequences[i].input_ids])[None]
    owner = torch.tensor([i for i in order for _ in range(len(sequences[i]))])
    positions = torch.cat([torch.arange(len(sequences[i])) for i in order])[None]
    allowed = (owner[:, None] == owner[None]) & torch.ones(24, 24, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    found = {}

    def keep(factors):
        for spec, delta in zip(factors.specs, factors.deltas, strict=True):
            gradient = torch.einsum("nto,nti->noi", delta, factors.x)
            if factors.experts is None:
                found[spec.key] = gradient
            else:
                table = found.setdefault(spec.key, gradient.new_zeros(3, 8, *gradient.shape[1:]))
                table[factors.experts.sample, factors.experts.expert] = gradient

    with gradients_of_activations_only(model), GradientCapture(model, targets, keep) as capture:
        capture.begin(samples=3, segments=[(1, 0, 5), (1, 5, 12), (0, 12, 19), (2, 19, 24)])
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
        losses = []
        for i in order:
            predicted = torch.tensor(sequences[i].loss_mask[1:])
            own = torch.tensor(sequences[i].input_ids.astype("int64"))
            losses.append(F.cross_entropy(logits[owner == i][:-1][predicted], own[1:][predicted]))
        torch.stack(losses).sum().backward()
        capture.finish()
    assert set(found) == set(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-7)


@given(st.data())
def test_every_token_reaches_its_sample_in_order(data):
    """Any cut of a row into segments, any owners: each sample has its tokens, in the order of the row, then zeros."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    stops = np.cumsum(lengths)
    segments = [
        (owner, int(stop - length), int(stop)) for owner, length, stop in zip(owners, lengths, stops, strict=True)
    ]
    row = torch.arange(1.0, stops[-1] + 1)
    tokens = TokenMap(4, segments)
    of_token = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(tokens.owners(len(row), row.device), of_token)
    for sample, found in enumerate(tokens.split(row[None, :, None])[..., 0]):
        own = row[of_token == sample]
        assert torch.equal(found[: len(own)], own)
        assert not found[len(own) :].any()


@given(groups=st.integers(1, 4), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_parts_of_a_fused_layer_divide_its_outputs(groups, sizes):
    parts = consecutive(groups, **{f"part{i}": size for i, size in enumerate(sizes)})
    outputs = torch.arange(groups * sum(sizes))
    assert [len(part) for part in parts.values()] == [len(part.of(outputs)) for part in parts.values()]
    assert torch.cat([part.of(outputs) for part in parts.values()]).sort().values.equal(outputs)


def test_tokens_of_a_sample_are_joined_and_padded_with_zeros():
    tokens = TokenMap(3, [(2, 0, 1), (0, 1, 3), (2, 3, 5)])
    rows = tokens.split(torch.arange(1.0, 6.0)[None, :, None])
    assert rows[..., 0].tolist() == [[2, 3, 0], [0, 0, 0], [1, 4, 5]]
    assert tokens.owners(5, torch.device("cpu")).tolist() == [2, 0, 0, 2, 2]


def test_sequences_of_a_sample_are_joined():
    tokens = TokenMap(2)
    assert tokens.split(torch.arange(8.0).view(4, 2, 1))[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert tokens.owners(8, torch.device("cpu")).tolist() == [0] * 4 + [1] * 4


def test_batch_of_no_samples_hands_nothing_over(llama):
    with GradientCapture(llama, find_targets(llama), lambda factors: pytest.fail("handed over")) as capture:
        capture.begin(samples=1)
        with torch.no_grad():
            llama(input_ids=torch.tensor([[5, 6]]))
        capture.finish()


# layer types ---------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A layer that holds half of the weight that it applies."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return F.linear(x, 2 * self.weight)


@pytest.fixture
def register(monkeypatch):
    """Registers the type of `Doubled` for the time of a test."""

    def enter(factors):
        monkeypatch.delitem(layer_types._parts, "Doubled", raising=False)
        layer_types.register("Doubled")(
            LayerType(lambda module: (module.weight.shape[1], module.weight.shape[0]), factors)
        )

    yield enter
    layer_types._parts.pop("Doubled", None)


@pytest.mark.parametrize("module", [nn.Linear(5, 3), transformers.pytorch_utils.Conv1D(3, 5)])
def test_layer_types_keep_their_contract(module):
    check_layer_type(module)


def test_layer_of_a_stranger_is_checked_and_measured_under_its_name(register):
    register(lambda module, x, delta: (2 * x, delta))
    check_layer_type(Doubled(5, 3))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED | HEAD_DIM)).double().eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Doubled(16, 16).double()
    (sample,) = random_samples(9)
    found = captured_gradients(model, find_targets(model, ["o"]), collate([sample], 0))
    gradients = weight_gradients(model, sample)
    for i in range(2):
        close(found[f"{i}.o"][0], gradients[f"model.layers.{i}.self_attn.o_proj.weight"])


def test_checker_refuses_wrong_factors_and_unknown_layers(register):
    with pytest.raises(ContractError, match="Doubled: no registered layer type"):
        check_layer_type(Doubled(5, 3))
    register(None)
    with pytest.raises(ContractError, match="Doubled: the factors of 1 tokens do not give the gradient of weight"):
        check_layer_type(Doubled(5, 3))
