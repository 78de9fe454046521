"""Which gradient to measure where peft has put adapters on a model.

    weight     Δᵀ X of the adapted layer's full weight, comparable with full fine-tuning; the default
    lora-pro   s B ∇A + s ∇B A, the direction in which a step on A and B moves that weight; rank at most 2r
    raw        ∇A and ∇B themselves, as projections of their own

with s the scaling of the adapter. All three need nothing but X and Δ of the adapted layer, and the last two are only measured
where there is an adapter. `lora-pro` never forms a matrix of the weight's size: with ∇A = s Bᵀ Δᵀ X and ∇B = s Δᵀ X Aᵀ it is
the product of the factors [s B, s ∇B] and [∇A; A], which have 2r rows whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selector.errors import ModelError
from selector.gradients.layers import Factors


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a wrapper of peft around a layer.

    Args:
        module: any module.
    """
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters whose gradients cannot be told apart.

    Args:
        model: with or without adapters.

    Raises:
        ModelError: an adapter sits on a parameter instead of a layer.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            raise ModelError(
                "adapters on parameters cannot be measured", got=f"target_parameters at {name}", allowed="target_modules",
                fix="peft merges such an adapter into the parameter before the layer runs, so that its own inputs and outputs "
                "never exist; adapt modules instead, or score the base model",
            )  # fmt: skip


def active_lora(name: str, module: nn.Module) -> str | None:
    """Name of the LoRA adapter in use on a wrapped layer; None where there is none.

    Args:
        name: path of the module, for messages.
        module: a wrapper of peft.

    Raises:
        ModelError: the adapter is no plain LoRA, or there are several.
    """
    adapters = [
        adapter for adapter in getattr(module, "active_adapters", ()) if adapter in getattr(module, "lora_A", ())
    ]
    variants = getattr(module, "lora_variant", {})
    if len(adapters) > 1:
        raise ModelError(
            "several adapters are active",
            got=f"{', '.join(adapters)} on {name}",
            allowed="one",
            fix="call model.set_adapter(name) first",
        )
    if not adapters:
        return None
    if adapters[0] in variants or getattr(module, "use_dora", {}).get(adapters[0]):
        raise ModelError(
            "the adapter is no plain LoRA",
            got=f"{adapters[0]} on {name}",
            allowed="LoRA without variants",
            fix="measure --adapter weight",
        )
    return adapters[0]


def equivalent_gradient(module: Any, adapter: str, x: Float[Tensor, "N T I"], delta: Float[Tensor, "N T O"]) -> Factors:
    """Factors of the change of the full weight that a gradient step on a LoRA adapter makes, per unit of learning rate.

    Args:
        module: a LoRA layer of peft.
        adapter: name of the adapter.
        x: inputs of the layer.
        delta: gradients of its outputs.

    Returns:
        `[N, 2r, I]` and `[N, 2r, O]`, whose product is s B ∇A + s ∇B A.

    Source: LoRA-Pro, arXiv 2407.18242, the equivalent gradient.
    """
    a: Float[Tensor, "r I"] = module.lora_A[adapter].weight.detach().to(x.dtype)
    b: Float[Tensor, "O r"] = module.lora_B[adapter].weight.detach().to(x.dtype)
    delta = delta.to(x.dtype)
    scale = module.scaling[adapter]
    gradient_a = scale * (delta @ b).mT @ x
    gradient_b = scale * (x @ a.mT).mT @ delta  # transposed: [N, r, O]
    samples = len(x)
    inputs = torch.cat([gradient_a, a.expand(samples, -1, -1)], dim=1)
    outputs = torch.cat([(scale * b.mT).expand(samples, -1, -1), scale * gradient_b], dim=1)
    return inputs, outputs


def lora_matrices(module: Any, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """The two modules of a LoRA adapter by the names that peft gives them.

    Args:
        module: a LoRA layer of peft.
        adapter: name of the adapter.
    """
    yield "lora_A", module.lora_A[adapter]
    yield "lora_B", module.lora_B[adapter]
