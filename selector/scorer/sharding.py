"""Models that no single GPU holds: FSDP2 and DeepSpeed ZeRO-3, as `accelerate launch` asks for them.

Both gather a layer's weights from all processes whenever one runs it, so that every process must run the model equally
often: those with fewer batches repeat a short one and drop its results. Accelerate shards a model only beside an
optimizer, which here has no rate and never steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def wants_sharding() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed; then the model is loaded on the CPU and moves when it is sharded."""
    return Accelerator().distributed_type in SHARDING


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold parts of the weights.

    Args:
        model: any model.
    """
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def shard(model: nn.Module) -> nn.Module:
    """Shard a model when the launcher asks for it and nobody has done so yet. It cannot be undone.

    Args:
        model: a model, whole on every process or sharded.

    Returns:
        The model to call in place of it.
    """
    # under ZeRO-3 the weights are parted as they are loaded, and still need the engine
    ready = (
        any(isinstance(parameter, DTensor) for parameter in model.parameters()) or without_engine(model) is not model
    )
    if ready or not wants_sharding():
        return model
    accelerator = Accelerator()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(train_micro_batch_size_per_gpu=1, zero_allow_untested_optimizer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return accelerator.prepare(model, optimizer)[0]


def without_engine(model: nn.Module) -> nn.Module:
    """The model that a DeepSpeed engine runs; any other as it is.

    Args:
        model: what `shard` returned.
    """
    return model.module if type(model).__name__ == "DeepSpeedEngine" else model  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter's values with the shards of all processes joined; every process must ask for it.

    Args:
        parameter: of a sharded or an ordinary model.
    """
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor().detach()
    elif hasattr(parameter, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()
    else:
        yield parameter.detach()
