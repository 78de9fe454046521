"""Which modules of a model to measure: the projections of its decoder layers, by the names that model families use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from selector.errors import ModelError, did_you_mean
from selector.types import PROJECTIONS, LayerSpec

ROLE_OF_NAME = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
"""Role of a linear layer by the last part of its path."""

LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """One module to hook, and the weight matrix that it stands for."""

    module: nn.Module
    spec: LayerSpec


def find_targets(model: nn.Module, projections: Sequence[str] = PROJECTIONS, layers: Sequence[int] = ()) -> list[Target]:
    """Projections of the decoder layers, in order of layer and projection.

    Args:
        model: a causal language model.
        projections: roles to measure.
        layers: decoder layers to measure, negative from the end; all when empty.

    Raises:
        ModelError: nothing matches; the message lists the linear layers that the model has.
    """
    unknown = [name for name in projections if name not in PROJECTIONS]
    if unknown:
        raise ModelError("unknown projection", got=", ".join(unknown), allowed=", ".join(PROJECTIONS), fix=did_you_mean(unknown[0], PROJECTIONS) or None)
    found: list[Target] = []
    for name, module in model.named_modules():
        role = ROLE_OF_NAME.get(name.rpartition(".")[2])
        index = LAYER_INDEX.search(name)
        if role is None or index is None or not isinstance(module, nn.Linear):
            continue
        spec = LayerSpec(
            name=name, layer=int(index[1]), projection=role, in_features=module.in_features, out_features=module.out_features
        )
        found.append(Target(module, spec))
    if not found:
        linear = {re.sub(r"\.\d+\.", ".N.", name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ModelError(
            f"{type(model).__name__} has no projection that is known by name", got=", ".join(sorted(linear)) or "no linear layer",
            allowed=", ".join(ROLE_OF_NAME),
        )  # fmt: skip
    count = max(target.spec.layer for target in found) + 1
    outside = [i for i in layers if not -count <= i < count]
    if outside:
        raise ModelError("no such layer", got=outside, allowed=f"{-count} ... {count - 1}", fix="change --layers")
    wanted = {i % count for i in layers} if layers else set(range(count))
    kept = [target for target in found if target.spec.layer in wanted and target.spec.projection in projections]
    if not kept:
        roles = sorted({target.spec.projection for target in found}, key=PROJECTIONS.index)
        raise ModelError("no layer has these projections", got=", ".join(projections), allowed=", ".join(roles), fix="change --projections")
    return sorted(kept, key=lambda target: (target.spec.layer, PROJECTIONS.index(target.spec.projection)))
