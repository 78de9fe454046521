"""Pack samples into batches of about equal token count, and into tensors: padded, or joined without padding.

Samples are sorted by length, so that little is padding, and a batch holds as many as its token budget allows, padding
included. Which samples share a batch has no effect on any score.

Joined sequences lie one behind the other in a single row, and positions that begin anew tell the model where. That pays
with attention kernels that skip what lies between sequences (flash attention); others compute and mask it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.data.samples import Sample, TokenSequence

SMALLEST_BATCH = 1 / 2
"""Of the token budget, for the last batches that several processes take: smaller ones would leave a GPU waiting for the host."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one forward and backward pass; S sequences, an equal number for each of N samples.

    Tokens are `[S, T]`, or `[1, T]` where the sequences are joined.
    """

    samples: tuple[Sample, ...]
    input_ids: Int[Tensor, "R T"]
    attention_mask: Int[Tensor, "R T"]
    """1 for tokens, 0 for padding."""
    loss_mask: Bool[Tensor, "R T"]
    reference: Float[Tensor, " S"]
    """Log-probability of the loss tokens under the reference model, nats; NaN where there is none."""
    advantage: Float[Tensor, " S"]
    """How much better than its group a rollout was; NaN where there is none."""

    segments: tuple[tuple[int, int, int], ...] = ()
    """Sample, first token and end of each sequence where they are joined; empty where they are padded."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with. Padding comes last, where no token that counts can see it: it needs no mask, without
        which attention takes its fastest kernels."""
        if not self.segments:
            return {"input_ids": self.input_ids}
        positions = torch.cat([torch.arange(stop - start) for _, start, stop in self.segments])
        return {"input_ids": self.input_ids, "position_ids": positions[None].to(self.input_ids.device)}

    @property
    def sequence_of_token(self) -> Int[Tensor, "R T"]:
        """Number of the sequence, 0 <= s < S, that each token belongs to."""
        device = self.input_ids.device
        if not self.segments:
            return torch.arange(len(self.input_ids), device=device)[:, None].expand_as(self.input_ids)
        lengths = torch.tensor([stop - start for _, start, stop in self.segments], device=device)
        return torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]


def deal(samples: Sequence[Sample], ranks: int) -> list[list[Sample]]:
    """Share samples among ranks so that all finish together: longest first, each to the rank with the fewest tokens.

    Args:
        samples: what is to be scored, any order.
        ranks: number of processes.

    Returns:
        The samples of each rank; a function of the samples alone, so that every rank computes the same.
    """
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[Sample]] = [[] for _ in range(ranks)]
    for sample in sorted(samples, key=lambda s: (-s.n_tokens, s.row)):
        tokens, rank = heapq.heappop(loads)
        shares[rank].append(sample)
        heapq.heappush(loads, (tokens + sample.n_tokens, rank))
    return shares


class BatchQueue:
    """Samples in batches of like length, longest first, so that the batch most likely to exhaust the memory comes first.

    The budget may change while the queue is emptied; only what is left is packed anew.

    Args:
        samples: what is to be scored, any order.
        tokens_per_batch: most tokens of a batch, padding included; a longer single sample gets a batch of its own.
    """

    def __init__(self, samples: Iterable[Sample], tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self._samples = deque(sorted(samples, key=lambda s: (len(s.sequences), -_width(s), s.row)))

    def __len__(self) -> int:
        return len(self._samples)

    def pop(self) -> list[Sample]:
        """The next batch."""
        batch = [self._samples.popleft()]
        sequences, width = len(batch[0].sequences), _width(batch[0])
        while self._samples and len(self._samples[0].sequences) == sequences:
            if (len(batch) + 1) * sequences * width > self.tokens_per_batch:
                break
            batch.append(self._samples.popleft())
        return batch

    def put_back(self, batch: Sequence[Sample]) -> None:
        """Return a batch that could not be measured, for another try under a smaller budget.

        Args:
            batch: what `pop` returned last.
        """
        self._samples.extendleft(reversed(batch))


def _width(sample: Sample) -> int:
    return max(map(len, sample.sequences))


def token_budget_batches(samples: Sequence[Sample], tokens_per_batch: int, takers: int = 1) -> list[list[Sample]]:
    """All batches of a queue under one budget, longest samples first.

    Several processes that take the next batch whenever they are free finish together if the last batches are small, and
    all find work if there is little: for them no batch holds more than half of what is then left for each, down to a
    share of the budget.

    Args:
        samples: what is to be scored, any order.
        tokens_per_batch: most tokens of a batch, padding included; a longer single sample gets a batch of its own.
        takers: processes that take batches from this list.

    Returns:
        The batches; a function of the arguments alone, so that every process computes the same.
    """
    queue = BatchQueue(samples, tokens_per_batch)
    left = sum(sample.n_tokens for sample in samples)
    batches = []
    while queue:
        if takers > 1:
            fair = max(left // (2 * takers), int(SMALLEST_BATCH * tokens_per_batch))
            queue.tokens_per_batch = min(tokens_per_batch, fair)
        batches.append(queue.pop())
        left -= sum(sample.n_tokens for sample in batches[-1])
    return batches


def collate(samples: Sequence[Sample], pad_token_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad sequences on the right and stack them.

    Args:
        samples: of one batch, each with the same number of sequences.
        pad_token_id: fills the padding; its value has no effect.
        device: where the tensors go.
    """
    sequences = _sequences(samples)
    shape = (len(sequences), padded_length(max(map(len, sequences), default=0), device))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    for i, sequence in enumerate(sequences):
        input_ids[i, : len(sequence)] = sequence.input_ids
        attention_mask[i, : len(sequence)] = 1
        loss_mask[i, : len(sequence)] = sequence.loss_mask
    tokens, attended, predicted = (
        torch.from_numpy(array).to(device) for array in (input_ids, attention_mask, loss_mask)
    )
    return Batch(tuple(samples), tokens, attended, predicted, *_side_columns(sequences, device))


def padded_length(longest: int, device: torch.device | str) -> int:
    """Tokens to pad sequences to: on a GPU a multiple of 8, since matrix products of other lengths take slower kernels there.

    Args:
        longest: tokens of the longest sequence.
        device: where the batch goes.
    """
    return -(-longest // 8) * 8 if torch.device(device).type == "cuda" else longest


def join(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
    """Lay sequences one behind the other, without padding.

    Args:
        samples: of one batch, each with the same number of sequences.
        device: where the tensors go.
    """
    sequences = _sequences(samples)
    input_ids = torch.from_numpy(np.concatenate([s.input_ids for s in sequences])[None].astype(np.int64)).to(device)
    loss_mask = torch.from_numpy(np.concatenate([s.loss_mask for s in sequences])[None]).to(device)
    ends = np.cumsum([len(s) for s in sequences]).tolist()
    owners = [i for i, sample in enumerate(samples) for _ in sample.sequences]
    segments = tuple(zip(owners, [0, *ends[:-1]], ends, strict=True))
    return Batch(
        tuple(samples), input_ids, torch.ones_like(input_ids), loss_mask, *_side_columns(sequences, device), segments
    )


def _sequences(samples: Sequence[Sample]) -> list[TokenSequence]:
    return [sequence for sample in samples for sequence in sample.sequences]


def _side_columns(sequences: Sequence[TokenSequence], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Reference log-probabilities and advantages, NaN where there are none."""
    reference = np.array([s.reference for s in sequences], dtype=np.float32)
    advantage = np.array([s.advantage for s in sequences], dtype=np.float32)
    return torch.from_numpy(reference).to(device), torch.from_numpy(advantage).to(device)
