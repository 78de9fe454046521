"""How the gradient of a weight matrix is read from what a module takes in and the gradient of what it gives out.

For every module that computes y = x W over its last dimension, whatever the layout or number format in which it stores W, the
gradient is Δᵀ X with X its inputs and Δ the gradients of its outputs. A layer type therefore says how many inputs and
outputs a module has, and changes the factors only where the matrix of interest is not the one that the module applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from selector.registry import Registry

Factors = tuple[Float[Tensor, "N rows I"], Float[Tensor, "N rows O"]]
"""X and Δ of each sample, with as many rows as it has tokens or fewer; the gradient is Δᵀ X."""


@dataclass(frozen=True)
class LayerType:
    """What has to be known of a class of modules to measure its weight gradients."""

    size: Callable[[nn.Module], tuple[int, int]]
    """Number of inputs and of outputs of a module."""
    factors: Callable[[nn.Module, Tensor, Tensor], Factors] | None = None
    """Turns a module's inputs [N, T, I] and output gradients [N, T, O] into the factors to measure; None leaves them as they are."""


layer_types: Registry[LayerType] = Registry("layer type")
"""Layer types by class name; a module is of the first type that a class of its method resolution order names."""

# also FalconLinear and the 4-bit and 8-bit layers of bitsandbytes, whose packed weights have another shape
layer_types.register("Linear")(LayerType(lambda module: (module.in_features, module.out_features)))
# transformers' own, of GPT-2: the weight is stored as inputs x outputs
layer_types.register("Conv1D")(LayerType(lambda module: (module.nx, module.nf)))
# a wrapper of peft around any other layer: its outputs are those of the adapted weight
layer_types.register("BaseTunerLayer")(LayerType(lambda module: layer_size(module.get_base_layer())))


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The registered type of a module, or None when it is no linear layer.

    Args:
        module: any module.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    known = next((name for name in names if name in layer_types), None)
    if known == "BaseTunerLayer" and layer_type_of(module.get_base_layer()) is None:  # pyright: ignore[reportCallIssue]
        return None
    return None if known is None else layer_types[known]


def layer_size(module: nn.Module) -> tuple[int, int]:
    """Number of inputs and outputs of a linear layer.

    Args:
        module: of a registered type.
    """
    known = layer_type_of(module)
    assert known is not None, f"{type(module).__name__} is no linear layer"
    return known.size(module)


@dataclass(frozen=True)
class Columns:
    """The outputs of a fused layer that belong to one part: from start to stop in each of `groups` equal blocks."""

    groups: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.groups * (self.stop - self.start)

    def of(self, delta: Shaped[Tensor, "*batch O"]) -> Shaped[Tensor, "*batch _"]:
        """The part's columns of an output gradient.

        Args:
            delta: gradients of all outputs; the last dimension divides into the blocks.
        """
        return delta.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)


def consecutive(groups: int, **sizes: int) -> dict[str, Columns]:
    """Columns of parts that follow one another in each of `groups` equal blocks.

    Args:
        groups: number of blocks.
        sizes: width of each part in one block, in order.
    """
    columns, start = {}, 0
    for part, size in sizes.items():
        columns[part] = Columns(groups, start, start + size)
        start += size
    return columns
