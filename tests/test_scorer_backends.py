"""RMS norms in one kernel: only where a module is one, and with the results of the module's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, build, random_samples
from torch import nn

from selector.batching import collate
from selector.gradients.targets import find_targets
from selector.scorer import backends
from selector.scorer.features import FeatureExtractor
from selector.types import MEASURES

ONE_FOR_ALL = {"llama": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "olmo2": 9, "phi3": 5, "granite": 5, "qwen3_moe": 9}
"""Norms of families whose norms are weight times x over its root mean square."""
OTHERS = ["gemma", "gemma3", "gpt2", "starcoder2"]


class Norm(nn.Module):
    """What a subclass makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class Plain(Norm):
    def forward(self, x):
        return self.weight * self.normalized(x)


class Centred(Norm):
    def forward(self, x):
        return self.weight * self.normalized(x - x.mean(-1, keepdim=True))


class OneMore(Norm):
    def forward(self, x):
        return (1 + self.weight) * self.normalized(x)


class Gated(Norm):
    def forward(self, x, gate=None):
        return self.weight * self.normalized(x) * (1.0 if gate is None else gate)


class Wider(Norm):
    def forward(self, x):
        return (self.weight * self.normalized(x)).double()


class Outside(Norm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Demanding(Norm):
    def forward(self, x):
        raise ValueError("not like this")


class Doubled(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return self.weight * self.normalized(x) + self.bias


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(backends, "fuses", lambda device: True)


def replaced(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", [*ONE_FOR_ALL, *OTHERS])
def test_norms_of_a_family_are_replaced_for_the_time_of_a_run_and_give_the_same(name, everywhere):
    model = build(FAMILIES[name]).float()
    batch = collate(random_samples(9, 14, 6), pad_token_id=0)
    extractor = FeatureExtractor(model, find_targets(model), "high")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "fuses", lambda device: False)
        with extractor.attached():
            own = extractor(batch)
    with extractor.attached():
        assert replaced(model) == ONE_FOR_ALL.get(name, 0)
        fused = extractor(batch)
    assert not replaced(model)
    for mine, theirs in zip(fused, own, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for measure in MEASURES:
            np.testing.assert_allclose(mine[measure], theirs[measure], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [Plain, Centred, OneMore, Gated, Wider, Doubled, Outside, Demanding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_an_rms_norm_is_replaced(kind, dtype, everywhere):
    module = kind().to(dtype)
    with backends.fused_norms(module):
        assert replaced(module) == (kind is Plain)


def test_a_module_that_someone_else_has_replaced_stays(everywhere):
    module = Plain()
    other = module.forward = lambda x: 2 * x
    with backends.fused_norms(module):
        assert module.forward is other
    assert module.forward is other


def test_the_trial_runs_no_hooks(everywhere):
    module = Plain()
    module.register_forward_pre_hook(lambda *_: pytest.fail("FSDP's would gather weights"))
    with backends.fused_norms(module):
        assert replaced(module)


def test_weights_that_are_gathered_on_demand_are_left_alone(everywhere):
    module = Plain()
    module.weight.ds_id = 1
    with backends.fused_norms(module):
        assert not replaced(module)


def test_named_inputs_reach_the_module(everywhere):
    module, x = Plain(), torch.randn(3, 16)
    with backends.fused_norms(module):
        torch.testing.assert_close(module(x=x), module(x))


def test_of_two_dtypes_the_module_decides(everywhere):
    module = Plain()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with backends.fused_norms(module):
        assert replaced(module)
        found = module(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_dtype(dtype, everywhere):
    module = Plain().to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        own = module(x)
        with backends.fused_norms(module):
            fused = module(x)
    assert fused.dtype == own.dtype
    torch.testing.assert_close(fused, own)


def test_a_failure_restores_the_model(everywhere):
    module = Plain()
    with pytest.raises(RuntimeError, match="on the way"), backends.fused_norms(module):
        raise RuntimeError("on the way")
    assert not replaced(module)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_a_gpu_changes_no_dtype(dtype):
    module, x = Plain().to("cuda", dtype), torch.randn(3, 16, dtype=dtype, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), backends.fused_norms(module):
        assert replaced(module)
        assert module(x).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_on_a_gpu_the_kernel_gives_what_the_modules_give(name, dtype, tolerance, monkeypatch):
    model = build(FAMILIES[name]).to("cuda", dtype)
    batch = collate(random_samples(9, 14, 6), device="cuda", pad_token_id=0)
    extractor = FeatureExtractor(model, find_targets(model), "high")
    with extractor.attached():
        assert replaced(model) == ONE_FOR_ALL[name]
        fused = extractor(batch)
    monkeypatch.setattr(backends, "fuses", lambda device: False)
    with extractor.attached():
        assert not replaced(model)
        own = extractor(batch)
    for mine, theirs in zip(fused, own, strict=True):
        first, second = (np.asarray(row["frobenius_norm"], dtype=np.float64) for row in (mine, theirs))
        assert np.linalg.norm(first - second) <= tolerance * np.linalg.norm(second)
