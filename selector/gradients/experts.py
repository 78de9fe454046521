"""Routed experts: an expert sees the tokens that are routed to it, of whichever samples.

In transformers 5 the weights of all experts are stacks [E, O, I] that a function of a registry applies. While a capture is active
that function is the one below: the same computation, expert by expert, with the inputs and outputs of every expert in reach.
Before, and in code that comes with checkpoints, experts are a list of modules; hooks reach those, and which tokens
they got is read off the indexing that autograd recorded.

Each pair of a sample and an expert that it hits is measured as one matrix. Pairs are padded and handed over together with others
of about the same number of tokens, so that many small experts cost few calls and little padding. A token counts for an
expert if it has a gradient there, hence padding counts for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selector.errors import ModelError
from selector.gradients.layers import Columns, consecutive, layer_size, layer_type_of

IMPLEMENTATION = "selector"


@dataclass(frozen=True)
class ExpertStack:
    """The weights of all experts of a layer that have one purpose."""

    name: str
    """Name of the parameter that holds them all, or in a list of experts of the linear layer in each."""
    in_features: int
    out_features: int
    parts: dict[str, Columns | None]
    """Roles of its parts."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Which token and which expert each row of an expert computation belongs to; rows of one expert are consecutive."""

    token: Int[Tensor, " rows"]
    expert: Int[Tensor, " rows"]
    tokens: int
    experts: int


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """What the rows of factors of routed experts are: pairs of a sample and an expert."""

    sample: Int[Tensor, " P"]
    """Position of the pair's sample in the batch."""
    expert: Int[Tensor, " P"]
    """Index of the pair's expert."""
    tokens: Int[Tensor, " P"]
    """Tokens of the sample that the expert got and that have a gradient there."""


def expert_stacks(module: nn.Module) -> tuple[ExpertStack, ...]:
    """The weights of a module of routed experts that can be measured; nothing for any other module.

    Args:
        module: any module.
    """
    if isinstance(module, nn.ModuleList):
        return _listed_stacks(module)
    if (
        not hasattr(module, "is_transposed")
        or not hasattr(module, "_apply_gate")
        or getattr(module, "_is_expert_parallel", False)
    ):
        return ()
    stacks = []
    for name in ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            return ()
        inputs, outputs = weight.shape[1:] if module.is_transposed else (weight.shape[2], weight.shape[1])
        parts: dict[str, Columns | None] = {"expert_" + name.removesuffix("_proj"): None}
        if name == "gate_up_proj":
            groups, width = (1, outputs // 2) if getattr(module, "is_concatenated", True) else (outputs // 2, 1)
            parts = dict(consecutive(groups, expert_gate=width, expert_up=width))
        stacks.append(ExpertStack(name, inputs, outputs, parts))
    return tuple(stacks)


LISTED_ROLES = {
    "gate_proj": "expert_gate", "up_proj": "expert_up", "down_proj": "expert_down",
    "w1": "expert_gate", "w3": "expert_up", "w2": "expert_down",
}  # fmt: skip
"""Role of a linear layer of one expert of a list; Mixtral has numbers for names."""


def _listed_stacks(modules: nn.ModuleList) -> tuple[ExpertStack, ...]:
    children = [dict(expert.named_children()) for expert in modules]
    stacks = []
    for name, role in LISTED_ROLES.items():
        layers = [child[name] for child in children if name in child and layer_type_of(child[name]) is not None]
        sizes = {layer_size(layer) for layer in layers}
        if len(layers) == len(children) and len(sizes) == 1:
            stacks.append(ExpertStack(name, *sizes.pop(), parts={role: None}))
    return tuple(stacks)


Observer = Callable[[Tensor, Tensor, Callable[[], Routing]], None]
"""Takes inputs and outputs, one row for each token and expert that it goes to, and what tells which those are."""


@contextmanager
def observed_experts(observers: Mapping[nn.Module, Mapping[str, Observer]]) -> Iterator[None]:
    """Compute the routed experts of some modules such that every stack's inputs and outputs can be seen.

    Args:
        observers: for each module an observer of each stack, by the name of its parameter.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: dict[int, Any] = {id(module.config): module.config for module in observers}
    before = {key: config._experts_implementation for key, config in configs.items()}
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = partial(_experts_forward, observers)
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]


@contextmanager
def observed_expert(expert: nn.Module, name: str, observer: Observer, index: int, experts: int) -> Iterator[None]:
    """See the inputs and outputs of one linear layer of one expert of a list.

    Args:
        expert: a module of the list.
        name: of the layer in the expert.
        observer: called whenever the expert runs.
        index: of the expert in the list.
        experts: length of the list.
    """
    received: list[Tensor] = []

    def enter(expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received[:] = inputs[:1]

    def leave(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observer(inputs[0], output, partial(_routing_of, received.pop(), index, experts))

    handles = [expert.register_forward_pre_hook(enter), expert.get_submodule(name).register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routing_of(received: Float[Tensor, "rows I"], index: int, experts: int) -> Routing:
    """Which tokens an expert got, from the indexing by which they were picked."""
    node: Any = received.grad_fn
    while node is not None and not hasattr(node, "_saved_indices"):
        reshapes = type(node).__name__.startswith(("View", "UnsafeView", "Reshape", "Unsqueeze", "Squeeze"))
        node = node.next_functions[0][0] if reshapes else None
    if node is None:
        raise ModelError(
            "it cannot be told which tokens an expert got", got=type(received.grad_fn).__name__, allowed="tokens picked by an index",
            fix="use transformers 5, or leave the experts out by --projections",
        )  # fmt: skip
    dimension, token = next((i, chosen) for i, chosen in enumerate(node._saved_indices) if chosen is not None)
    return Routing(token, torch.full_like(token, index), node._saved_self_sym_sizes[dimension], experts)


def _experts_forward(
    observers: Mapping[nn.Module, Mapping[str, Observer]],
    module: Any,
    hidden_states: Float[Tensor, "tokens I"],
    top_k_index: Int[Tensor, "tokens k"],
    top_k_weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens I"]:
    """What transformers' own functions compute, with the rows sorted by expert."""
    tokens, chosen = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    counts = expert.bincount(minlength=module.num_experts).tolist()
    routing = Routing(token=order // chosen, expert=expert, tokens=tokens, experts=module.num_experts)
    seen = observers.get(module, {})

    def apply(name: str, rows: Tensor) -> Tensor:
        outputs = _linear_by_expert(module, name, rows, counts)
        if name in seen:
            seen[name](rows, outputs, lambda: routing)
        return outputs

    rows = hidden_states[routing.token]
    if getattr(module, "has_gate", True):
        rows = module._apply_gate(apply("gate_up_proj", rows))
    else:
        rows = module.act_fn(apply("up_proj", rows))
    rows = apply("down_proj", rows)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    by_token = rows[order.argsort()].view(tokens, chosen, -1)
    return by_token.sum(1).to(hidden_states.dtype)


def _linear_by_expert(module: Any, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    weight = getattr(module, name)
    bias = getattr(module, name + "_bias") if getattr(module, "has_bias", False) else None
    pieces = []
    for expert, piece in enumerate(rows.split(counts)):
        if len(piece):
            matrix = weight[expert].mT if module.is_transposed else weight[expert]
            pieces.append(F.linear(piece.to(matrix.dtype), matrix, None if bias is None else bias[expert]))
    return torch.cat(pieces)


def by_pair(
    x: Float[Tensor, "rows I"], delta: Float[Tensor, "rows O"], routing: Routing, owners: Int[Tensor, " tokens"]
) -> Iterator[tuple[Float[Tensor, "P T I"], Float[Tensor, "P T O"], ExpertRows]]:
    """Factors of each sample and expert, in groups of pairs with about the same number of tokens.

    Args:
        x: inputs of a stack.
        delta: gradients of its outputs.
        routing: what the rows are.
        owners: sample of each token of the batch.
    """
    live = (delta != 0).any(1).nonzero()[:, 0]
    if not len(live):
        return
    key = owners[routing.token[live]] * routing.experts + routing.expert[live]
    order = key.argsort(stable=True)
    live = live[order]
    pairs, pair_of_row, counts = key[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(live), device=x.device) - (counts.cumsum(0) - counts)[pair_of_row]
    bucket = (counts - 1).clamp(min=1).log2().floor().long()
    for size in bucket.unique().tolist():
        members = (bucket == size).nonzero()[:, 0]
        width = int(counts[members].max())
        position = torch.full_like(pairs, -1)
        position[members] = torch.arange(len(members), device=x.device)
        rows = (position[pair_of_row] >= 0).nonzero()[:, 0]
        target = position[pair_of_row[rows]] * width + place[rows]
        padded = []
        for values in (x, delta):
            flat = values.new_zeros(len(members) * width, values.shape[1])
            flat[target] = values[live[rows]]
            padded.append(flat.view(len(members), width, -1))
        yield (
            padded[0],
            padded[1],
            ExpertRows(pairs[members] // routing.experts, pairs[members] % routing.experts, counts[members]),
        )
