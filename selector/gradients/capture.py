"""Collect the factors of per-sample gradients while a model runs backward.

For a linear layer y = x Wᵀ the gradient of one sample is G = Δᵀ X, with X the layer's inputs at the sample's tokens and Δ the
gradients of the sample's loss with respect to its outputs. Hooks keep X from the forward pass and receive Δ in the
backward pass; no gradient of a weight is ever computed, so that the pass costs about two thirds of a training step.

Modules that read one input (q, k and v; gate and up) are handed over together, as soon as the last of them has its Δ, so
that whoever takes them can share the work on X and free all of it before the next layer arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selector.gradients.targets import Target
from selector.types import LayerSpec

@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Inputs of one layer and the output gradients of each projection that reads them; G = deltaᵀ x for each.

    Rows of padding tokens hold zeros in every delta, so they add nothing but zero singular values.
    """

    x: Float[Tensor, "N T I"]
    deltas: tuple[Float[Tensor, "N T _"], ...]
    specs: tuple[LayerSpec, ...]


Consumer = Callable[[LayerFactors], None]
"""Takes the factors of the modules that read one input; must not keep them."""


class _SharedInput:
    """One input and the output gradients, so far, of the modules that read it."""

    def __init__(self, x: Float[Tensor, "S T I"]) -> None:
        self.x = x
        self.waiting: dict[str, LayerSpec] = {}
        self.deltas: list[tuple[LayerSpec, Tensor]] = []


class GradientCapture:
    """Hooks on the target modules of one model, for the time of a `with` block. The model is left as it was.

    Args:
        model: a causal language model.
        targets: modules to measure, from `find_targets`.
        consumer: called once for each group of modules that share an input, in the order of the backward pass.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], consumer: Consumer) -> None:
        self.model, self.targets, self.consumer = model, targets, consumer
        self.sequences_per_sample = 1
        self._groups: list[_SharedInput] = []

    def __enter__(self) -> GradientCapture:
        self._handles = [target.module.register_forward_hook(self._forward_hook(target.spec)) for target in self.targets]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._groups = []

    def begin(self, sequences_per_sample: int = 1) -> None:
        """Start a batch.

        Args:
            sequences_per_sample: how many consecutive sequences add up to one sample.
        """
        self.sequences_per_sample = sequences_per_sample
        self._groups = []

    def finish(self) -> None:
        """End a batch: hand over the groups in which some module got no gradient."""
        for group in self._groups:
            self._hand_over(group)
        self._groups = []

    def _forward_hook(self, spec: LayerSpec) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach()
            group = self._groups[-1] if self._groups else None
            if group is None or group.x.data_ptr() != x.data_ptr() or group.x.shape != x.shape:
                group = _SharedInput(x)
                self._groups.append(group)
            group.waiting[spec.key] = spec
            output.register_hook(lambda delta: self._receive(group, spec, delta))

        return hook

    def _receive(self, group: _SharedInput, spec: LayerSpec, delta: Float[Tensor, "S T O"]) -> None:
        group.deltas.append((group.waiting.pop(spec.key), delta.detach()))
        if not group.waiting:
            self._hand_over(group)

    def _hand_over(self, group: _SharedInput) -> None:
        if group.deltas:
            specs, deltas = zip(*group.deltas, strict=True)
            x, *deltas = (self._by_sample(tensor) for tensor in (group.x, *deltas))
            with torch.no_grad():
                self.consumer(LayerFactors(x=x, deltas=tuple(deltas), specs=specs))
        group.deltas = []
        group.x = group.x.new_empty(0)

    def _by_sample(self, tensor: Float[Tensor, "S T C"]) -> Float[Tensor, "N sT C"]:
        """Join the sequences of each sample along the tokens: their gradients add."""
        sequences, tokens, width = tensor.shape
        per_sample = self.sequences_per_sample
        return tensor.reshape(sequences // per_sample, per_sample * tokens, width)


@contextmanager
def gradients_of_activations_only(model: nn.Module) -> Iterator[None]:
    """Let a backward pass reach every layer but no weight, without dropout; everything is restored afterwards.

    Weights stop requiring gradients and the embeddings' output starts to, so that autograd goes through the layers for
    their inputs' sake alone.

    Args:
        model: a Hugging Face model.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    embeddings: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for name, module in model.named_modules():
            module.training = training[name]
