"""Which of torch's kernels a scoring pass runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from selector.runtime import torch_is_at_least

EPSILONS = ("variance_epsilon", "eps")
"""What models call the number that a norm adds to the mean square."""
ROUNDINGS = 4
"""By so many roundings of a number the fused kernel may differ from the module; it makes one where modules make up to three."""


@contextmanager
def without_plans() -> Iterator[None]:
    """No attention by cuDNN, which builds a plan for every new shape of a batch: 0.1 s each for a model of 28 layers, a quarter of the passes.

    Training in batches of one shape profits from it, batches of like length, each of another shape, do not.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """RMS norms on a GPU by torch's own kernel, which passes over the activations once where the models' code takes twenty passes.

    Only modules that compute what the kernel computes, by trial; all others stay as they are.

    Args:
        model: any model; restored at the end.
    """
    replaced: list[nn.Module] = []
    try:
        for module in model.modules():
            epsilon = next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
            if isinstance(epsilon, float) and _may_be_rms_norm(module) and _is_rms_norm(module, epsilon):
                module.forward = partial(_rms_norm, module, module.forward, epsilon)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _may_be_rms_norm(module: nn.Module) -> bool:
    """Whether a module on a GPU has what an RMS norm has, and a forward pass that nobody has replaced."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or isinstance(module, nn.RMSNorm) or "forward" in vars(module):
        return False
    weight = parameters["weight"]
    return (
        fuses(weight.device)
        and weight.ndim == 1
        and weight.numel() > 0
        and weight.dtype.itemsize > 1
        and not hasattr(weight, "ds_id")  # ZeRO-3 gathers weights whenever a module is called, on all processes
        and len(inspect.signature(module.forward).parameters) == 1
    )


def fuses(device: torch.device) -> bool:
    """Whether torch computes an RMS norm in one kernel there.

    Args:
        device: of the model.
    """
    return device.type == "cuda" and torch_is_at_least(2, 9)


class _WithoutHooks(nn.Module):
    """Runs a module's own code alone: FSDP's hooks would gather weights that the trial does not use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


@torch.no_grad()
def _is_rms_norm(module: nn.Module, epsilon: float) -> bool:
    """Whether the module does to random inputs, large ones and ones that its epsilon outweighs, with a random weight, what the kernel does."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, epsilon**0.5], device="cpu")[:, None, None]
    x = scales * torch.randn(2, 4, len(weight), generator=generator, device="cpu")
    factor = 1 + 0.5 * torch.randn(len(weight), generator=generator, device="cpu")
    x, factor = (tensor.to(weight.device, weight.dtype) for tensor in (x, factor))
    with torch.autocast(x.device.type, enabled=False):
        try:
            own = functional_call(_WithoutHooks(module), {"module.weight": factor}, (x,))
        except Exception:  # whatever its code does not like: a plain RMS norm likes any input
            return False
        fused = F.rms_norm(x, factor.shape, factor, epsilon)
    if not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != x.dtype:
        return False
    allowed = ROUNDINGS * torch.finfo(x.dtype).eps * fused.double().abs()
    return bool(((own.double() - fused.double()).abs() <= allowed).all())


def _rms_norm(module: nn.Module, own: Callable[..., Any], epsilon: float, *inputs: Any, **named: Any) -> Any:
    """The kernel in place of a module's own code, which keeps the calls in which casts or shapes are its business."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if named or len(inputs) != 1 or inputs[0].dtype != weight.dtype or inputs[0].shape[-1:] != weight.shape:
        return own(*inputs, **named)
    with torch.autocast(weight.device.type, enabled=False):  # it would compute in float32, and so give float32
        return F.rms_norm(inputs[0], weight.shape, weight, epsilon)
