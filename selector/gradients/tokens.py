"""Whose tokens are whose: from the tensors that a model computes to one row per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Segment = tuple[int, int, int]
"""Sample, first token and end of a run of its tokens in a batch that is one long sequence."""


class TokenMap:
    """Which tokens of a batch belong to which sample.

    Args:
        samples: number of samples.
        segments: where each sample's tokens are when sequences are joined without padding; when empty, every sample has an equal
            number of consecutive, padded sequences.
    """

    def __init__(self, samples: int, segments: Sequence[Segment] = ()) -> None:
        self.samples = samples
        self._length = 0
        self._source: Tensor | None = None
        if segments:
            owner = torch.cat([torch.full((stop - start,), sample) for sample, start, stop in segments])
            self._source = torch.cat([torch.arange(start, stop) for _, start, stop in segments])
            counts = owner.bincount(minlength=samples)
            self._length = int(counts.max())
            order = owner.argsort(stable=True)
            self._source, self._owner = self._source[order], owner[order]
            place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self._owner]
            self._destination = self._owner * self._length + place

    def split(self, tensor: Float[Tensor, "*tokens C"]) -> Float[Tensor, "N T C"]:
        """One row per sample: its sequences joined along the tokens, because their gradients add, and padded with zeros.

        Args:
            tensor: one vector per token of the batch, with or without a dimension of sequences.
        """
        width = tensor.shape[-1]
        if self._source is None:
            return tensor.reshape(self.samples, -1, width)
        rows = tensor.new_zeros(self.samples * self._length, width)
        rows[self._destination.to(tensor.device)] = tensor.reshape(-1, width)[self._source.to(tensor.device)]
        return rows.reshape(self.samples, self._length, width)

    def owners(self, tokens: int, device: torch.device) -> Int[Tensor, " tokens"]:
        """The sample of every token of the batch, in the order in which the model has them.

        Args:
            tokens: number of tokens of the batch, padding included.
            device: where the result goes.
        """
        if self._source is None:
            return torch.arange(self.samples, device=device).repeat_interleave(tokens // self.samples)
        owners = torch.zeros(tokens, dtype=torch.long)
        owners[self._source] = self._owner
        return owners.to(device)
