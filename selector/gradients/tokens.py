"""Whose tokens are whose: from the tensors that a model computes to one row per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.batching import padded_length

Segment = tuple[int, int, int]
"""Sample, first token and end of a run of its tokens in a batch that is one long sequence."""

_Places = tuple[Tensor, Tensor, Tensor]
"""Of every token that belongs to a sample: its position in the batch, its sample, and its position among the sample's tokens."""


class TokenMap:
    """Which tokens of a batch belong to which sample.

    Args:
        samples: number of samples.
        segments: where each sample's tokens are when sequences are joined without padding; when empty, every sample has an equal
            number of consecutive, padded sequences.
    """

    def __init__(self, samples: int, segments: Sequence[Segment] = ()) -> None:
        self.samples = samples
        self._places: _Places | None = _places(samples, segments) if segments else None
        self._longest = int(self._places[2].max()) + 1 if self._places else 0

    def split(self, tensor: Float[Tensor, "*tokens C"]) -> Float[Tensor, "N T C"]:
        """One row per sample: its sequences joined along the tokens, because their gradients add, and padded with zeros.

        Args:
            tensor: one vector per token of the batch, with or without a dimension of sequences.
        """
        width = tensor.shape[-1]
        if self._places is None:
            return tensor.reshape(self.samples, -1, width)
        source, owner, place = (index.to(tensor.device) for index in self._places)
        self._places = source, owner, place  # moved once, not for every layer
        rows = tensor.new_zeros(self.samples, padded_length(self._longest, tensor.device), width)
        rows[owner, place] = tensor.reshape(-1, width)[source]
        return rows

    def owners(self, tokens: int, device: torch.device) -> Int[Tensor, " tokens"]:
        """The sample of every token of the batch, in the order in which the model has them.

        Args:
            tokens: number of tokens of the batch, padding included.
            device: where the result goes.
        """
        if self._places is None:
            return torch.arange(self.samples, device=device).repeat_interleave(tokens // self.samples)
        source, owner, _ = (index.to(device) for index in self._places)
        owners = torch.zeros(tokens, dtype=torch.long, device=device)
        owners[source] = owner
        return owners


def _places(samples: int, segments: Sequence[Segment]) -> _Places:
    owner = torch.cat([torch.full((stop - start,), sample) for sample, start, stop in segments])
    source = torch.cat([torch.arange(start, stop) for _, start, stop in segments])
    order = owner.argsort(stable=True)
    owner, source = owner[order], source[order]
    counts = owner.bincount(minlength=samples)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return source, owner, place
