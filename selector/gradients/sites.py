"""What a capture keeps while it waits: where inputs and output gradients meet, and those of them that have arrived."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from selector.errors import ModelError
from selector.gradients.experts import Routing
from selector.gradients.targets import Target
from selector.types import LayerSpec


class Site:
    """One place of a model where inputs and output gradients meet: a module, one stack of a module of experts, or a layer of one expert."""

    def __init__(self, targets: Sequence[Target], ancestors: Sequence[nn.Module], expert: int) -> None:
        self.targets = tuple(targets)
        self.module, self.stack, self.factors = targets[0].module, targets[0].stack, targets[0].factors
        self.name = targets[0].spec.name if self.stack is None else f"{targets[0].spec.name}.{self.stack.name}"
        self.ancestors, self.expert = ancestors, expert

    def parts(self, delta: Tensor) -> list[tuple[LayerSpec, Tensor]]:
        """The output gradients of each matrix that the module applies."""
        return [(target.spec, delta if target.columns is None else target.columns.of(delta)) for target in self.targets]


class Kept:
    """A tensor of the model that is kept for later, without a copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def is_same(self, tensor: Tensor) -> bool:
        return self._tensor.data_ptr() == tensor.data_ptr() and self._tensor.shape == tensor.shape

    def get(self, site: Site) -> Tensor:
        if self._tensor._version != self._version:
            raise ModelError(
                "a layer's inputs or output gradients were overwritten before they could be measured", got=site.name,
                allowed="operations that leave them alone", fix="switch off what works in place, or leave the layer out by --layers or --projections",
            )  # fmt: skip
        return self._tensor


class Input:
    """One input and the calls, so far, of the sites that read it; x is None once it was handed over."""

    def __init__(self, x: Kept, routing: Routing | None) -> None:
        self.x: Kept | None = x
        self.routing = routing
        self.calls: list[Call] = []

    def is_of(self, x: Tensor) -> bool:
        return self.x is not None and self.x.is_same(x)

    def release(self) -> tuple[Tensor | None, list[tuple[Site, Tensor]]]:
        """Give away the input and the output gradients that have arrived, and hold nothing any more."""
        x, calls = self.x, self.calls
        self.x, self.calls = None, []
        if x is None or not calls:
            return None, []
        deltas = []
        for call in calls:
            if call.delta is not None:
                deltas.append((call.site, call.delta.get(call.site)))
                call.delta = None
        return x.get(calls[0].site), deltas


class Call:
    """What is known of one site in the current batch."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.input: Input | None = None
        self.delta: Kept | None = None
