"""Every model family against plain autograd: factors of each layer and projection, element by element."""

from __future__ import annotations

import copy

import pytest
import torch
from families import (
    FAMILIES,
    FUSED,
    ROUTED,
    SEPARATE,
    assembled,
    build,
    by_weight,
    captured_gradients,
    close,
    full_gradient,
    parameters_of,
    random_samples,
    run_capture,
    stored_transposed,
    weight_gradients,
)  # fmt: skip
from torch import nn

from selector.batching import collate
from selector.gradients.targets import find_targets


@pytest.mark.parametrize("chosen", [*SEPARATE, *FUSED, *ROUTED])
def test_factors_equal_autograd_gradients_elementwise(chosen):
    """Every layer, every projection, in a padded batch of samples of unlike length."""
    model = build(chosen)
    targets = find_targets(model)
    assert [t.spec.projection for t in targets] == chosen.projections * 2
    samples = random_samples(7, 12, 3)
    found = captured_gradients(model, targets, collate(samples, 0))
    assert set(found) == {target.spec.key for target in targets}
    for i, sample in enumerate(samples):
        gradients = weight_gradients(model, sample)
        for group in by_weight(targets):
            expected = full_gradient(group[0], gradients)
            close(assembled(group, found, i, expected), expected)


def deltas_of(model) -> dict[str, torch.Tensor]:
    """Output gradients [T, O] of one sample by key; [P, T, O] of routed experts."""
    found = {}

    def keep(factors):
        for spec, delta in zip(factors.specs, factors.deltas, strict=True):
            found[spec.key] = delta[0] if factors.experts is None else delta

    run_capture(model, find_targets(model), collate(random_samples(9), 0), keep)
    return found


def without(model, targets, projection: str) -> nn.Module:
    """The model with the outputs of one projection at zero in every layer."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for target in targets:
        for name in parameters_of(target) if target.spec.projection == projection else ():
            weight = parameters[name].data if stored_transposed(target) else parameters[name].data.mT
            columns = (
                torch.arange(weight.shape[-1])
                if target.columns is None
                else target.columns.of(torch.arange(weight.shape[-1]))
            )
            weight[..., columns] = 0
            bias = name.removesuffix("weight") + "bias" if name.endswith(".weight") else name + "_bias"
            if bias in parameters:
                parameters[bias].data[..., columns] = 0
    return model


@pytest.mark.parametrize("chosen", [parameter for parameter in FUSED if parameter.id != "glm4"])
def test_fused_attention_is_split_into_what_acts_as_query_key_and_value(chosen):
    """The first token attends to itself whatever its query; without values, queries and keys change nothing."""
    model = build(chosen)
    targets = find_targets(model)
    deltas = deltas_of(model)
    silent = deltas_of(without(model, targets, "v"))
    for layer in range(2):
        for projection in ("q", "k", "v"):
            first, largest = deltas[f"{layer}.{projection}"][0].abs().max(), deltas[f"{layer}.{projection}"].abs().max()
            assert (first < 1e-12 * largest) == (projection == "q")
            assert (silent[f"{layer}.{projection}"].abs().max() == 0) == (projection != "v")


@pytest.mark.parametrize("chosen", [FAMILIES["phi3"], FAMILIES["glm4"], *ROUTED])
def test_fused_gates_are_split_into_what_acts_as_gate_and_up(chosen):
    """A gate of zero lets nothing through, so that nothing reaches the up projection."""
    model = build(chosen)
    targets = find_targets(model)
    prefix = "expert_" if "expert_gate" in chosen.projections else ""
    silent = deltas_of(without(model, targets, prefix + "gate"))
    assert all(not delta.any() for key, delta in silent.items() if key.endswith("." + prefix + "up"))
    assert all(delta.any() for key, delta in silent.items() if key.endswith("." + prefix + "gate"))
