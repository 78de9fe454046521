"""Which weight matrices of a model to measure: the projections of its decoder layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from selector.config import Adapter
from selector.errors import ConfigError, ModelError, SelectorError, did_you_mean, raise_all
from selector.gradients.adapters import active_lora, check_adapters, equivalent_gradient, is_adapted, lora_matrices
from selector.gradients.experts import ExpertStack, expert_stacks
from selector.gradients.layers import Columns, Factors, layer_size, layer_type_of
from selector.gradients.names import ROLE, ROLES, parts_of, role_of
from selector.types import LayerSpec

LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix whose gradient is measured, and how to read it."""

    module: nn.Module
    """The module that applies it."""
    spec: LayerSpec
    columns: Columns | None = None
    """Outputs that belong to it where the module applies several matrices as one."""
    factors: Callable[[Any, Any], Factors] | None = None
    """Turns the module's inputs and output gradients into the factors to measure; None leaves them as they are."""
    stack: ExpertStack | None = None
    """Which weights of a module of routed experts; None for any other module."""


def find_targets(
    model: nn.Module,
    projections: Sequence[str] = (),
    layers: Sequence[int] = (),
    *,
    names: Sequence[str] = (),
    adapter: Adapter = "weight",
) -> list[Target]:
    """Projections of the decoder layers, in order of layer and projection.

    Args:
        model: a causal language model, with or without adapters of peft.
        projections: roles to measure; all that the model has when empty.
        layers: decoder layers to measure, negative from the end; all when empty.
        names: roles of layers that are not known by name, each as role=pattern with a pattern of module paths.
        adapter: which gradient to measure where there is an adapter; see `selector.gradients.adapters`.

    Raises:
        ModelError: nothing matches; the message lists the linear layers that the model has.
        ConfigError: an entry of names cannot be read or matches no linear layer.
    """
    check_adapters(model)
    found = list(_all_targets(model, _given_roles(model, names), adapter))
    if not found:
        raise _nothing_known(model, adapter)
    twice = {
        a.spec.key: f"{a.spec.name} and {b.spec.name}"
        for i, a in enumerate(found)
        for b in found[:i]
        if a.spec.key == b.spec.key
    }
    if twice:
        raise ModelError(
            "two layers have the same role", got="; ".join(list(twice.values())[:3]), allowed="one layer for each decoder layer and role",
            fix="give one of them another role: --layer-names role=pattern",
        )  # fmt: skip
    count = max(target.spec.layer for target in found) + 1
    roles = sorted({target.spec.projection for target in found}, key=_rank)
    bases = {role.partition(".")[0] for role in roles}
    problems: list[SelectorError] = []
    unknown = [name for name in projections if name not in bases]
    if unknown:
        problems.append(ModelError("the model has no such projection", got=", ".join(unknown), allowed=", ".join(sorted(bases, key=_rank)),
                                   fix=did_you_mean(unknown[0], bases) or "change --projections"))  # fmt: skip
    outside = [i for i in layers if not -count <= i < count]
    if outside:
        problems.append(
            ModelError("no such layer", got=outside, allowed=f"{-count} ... {count - 1}", fix="change --layers")
        )
    raise_all(problems)
    wanted = {i % count for i in layers} if layers else set(range(count))
    kept = [
        t
        for t in found
        if t.spec.layer in wanted and (not projections or t.spec.projection.partition(".")[0] in projections)
    ]
    if not kept:
        raise ModelError("the wanted layers have none of the wanted projections", got=f"layers {sorted(wanted)}, projections {', '.join(projections)}",
                         fix="change --layers or --projections")  # fmt: skip
    return sorted(kept, key=lambda target: (target.spec.layer, _rank(target.spec.projection)))


def unmeasured(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Modules of the decoder layers with weight matrices that no target measures, so that a report can say so.

    Args:
        model: the model that the targets belong to.
        targets: what `find_targets` returned.

    Returns:
        Paths with N in place of the layer's index, sorted.
    """
    inside = {id(part) for target in targets for part in (target.module, *target.module.modules())}
    return sorted(
        {
            re.sub(r"(^|\.)\d+\.", r"\1N.", name)
            for name, module in _decoder_modules(model)
            if LAYER_INDEX.search(name) and id(module) not in inside
            and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        }
    )  # fmt: skip


def _rank(projection: str) -> tuple[int, str]:
    base = projection.partition(".")[0]
    return (ROLES.index(base) if base in ROLES else len(ROLES), projection)


def _all_targets(model: nn.Module, given: dict[str, str], adapter: Adapter) -> Iterator[Target]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = dict(_decoder_modules(model))
    everything = dict(model.named_modules())
    inside: tuple[str, ...] = ()
    for name, module in {**known, **{name: everything[name] for name in given}}.items():
        index = LAYER_INDEX.search(name)
        if index is None or name.startswith(inside):
            continue
        path, layer = name[index.end() :], int(index[1])
        for stack in expert_stacks(module) if adapter == "weight" else ():
            for role, columns in stack.parts.items():
                outputs = stack.out_features if columns is None else len(columns)
                spec = LayerSpec(
                    name=name, layer=layer, projection=role, in_features=stack.in_features, out_features=outputs
                )
                yield Target(module, spec, columns=columns, stack=stack)
        kind, role = layer_type_of(module), given.get(name) or role_of(path)
        if kind is None or role is None:
            continue
        if is_adapted(module):
            inside = (*inside, name + ".")
        if adapter == "weight":
            factors = partial(kind.factors, module) if kind.factors else None
            yield from _parts(name, layer, role, module, config, factors)
        elif is_adapted(module) and (lora := active_lora(name, module)):
            if adapter == "lora-pro":
                yield from _parts(name, layer, role, module, config, partial(equivalent_gradient, module, lora))
            else:
                for matrix, part in lora_matrices(module, lora):
                    inputs, outputs = layer_size(part)
                    spec = LayerSpec(
                        name=f"{name}.{matrix}.{lora}",
                        layer=layer,
                        projection=f"{role}.{matrix}",
                        in_features=inputs,
                        out_features=outputs,
                    )
                    yield Target(part, spec)


def _parts(
    name: str, layer: int, role: str, module: nn.Module, config: Any, factors: Callable[[Any, Any], Factors] | None
) -> Iterator[Target]:
    inputs, outputs = layer_size(module)
    for part, columns in parts_of(role, config, outputs).items():
        size = outputs if columns is None else len(columns)
        spec = LayerSpec(name=name, layer=layer, projection=part, in_features=inputs, out_features=size)
        yield Target(module, spec, columns=columns, factors=factors)


def _decoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the text decoder alone where the model has other towers, with their paths in the whole model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    for name, module in model.named_modules():
        if not prefix or name.startswith(prefix + "."):
            yield name, module


def _given_roles(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Roles that the user gave, by path."""
    linear = {name for name, module in model.named_modules() if layer_type_of(module) and LAYER_INDEX.search(name)}
    problems: list[SelectorError] = []
    given: dict[str, str] = {}
    for entry in names:
        role, _, pattern = entry.partition("=")
        matches = [name for name in linear if pattern and fnmatchcase(name, pattern)]
        if not ROLE.fullmatch(role):
            problems.append(
                ConfigError(
                    "layer_names cannot be read", got=entry, allowed="role=pattern, such as o=*.attn.attention_output"
                )
            )
        elif not matches:
            problems.append(ConfigError("layer_names matches no linear layer", got=entry, allowed=_shown(linear)))
        given |= dict.fromkeys(matches, role)
    raise_all(problems)
    return given


def _nothing_known(model: nn.Module, adapter: Adapter) -> ModelError:
    if adapter != "weight":
        return ModelError(
            "the model has no LoRA adapter on a known layer", got=f"--adapter {adapter}", fix="measure --adapter weight"
        )
    linear = {name for name, module in model.named_modules() if layer_type_of(module)}
    return ModelError(
        f"{type(model).__name__} has no projection that is known by name", got=_shown(linear),
        allowed=", ".join(ROLES), fix="say which layer has which role: --layer-names role=pattern, such as o=*.attn.attention_output",
    )  # fmt: skip


def _shown(names: set[str]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})) or "no linear layer"
