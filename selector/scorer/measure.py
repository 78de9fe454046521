"""Which batches a process measures, and how they stay within the memory of its device.

A process that holds the model whole takes the next of all batches whenever it is free. A batch that exhausts the memory is
tried again under half the budget, which then stays halved. A sharded model is run by all in step, each on its own share,
and leaves no second try: the other processes are in the middle of the same layers.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch

from selector.batching import Batch, BatchQueue
from selector.data.samples import Sample
from selector.errors import ModelError
from selector.scorer.features import FeatureExtractor, sample_row
from selector.scorer.progress import Progress
from selector.spectra.cores import free_memory

logger = logging.getLogger("selector")

DEFAULT_BUDGET = 4096
"""Where memory cannot be measured: on a CPU, and for a sharded model, which has no second try."""
LARGEST_BUDGET = 32_768
SHARE_OF_MEMORY = 0.7
"""Of the memory that is free beside the model, for batches whose size is derived from one measured batch."""
OUT_OF_MEMORY = "error: out of memory"

Extract = Callable[[Batch], list[dict[str, Any]]]
Collate = Callable[[Sequence[Sample]], Batch]
Take = Callable[[dict[str, Any]], None]

T = TypeVar("T")


def handed_out(
    batches: Sequence[Sequence[Sample]], numbers: Iterable[int], others: int, progress: Progress
) -> Iterator[Sequence[Sample]]:
    """The batches whose number this process draws, until there are no more.

    Args:
        batches: of all processes, the same on each.
        numbers: what this process draws, in rising order, each when it is asked for.
        others: how many other processes draw.
        progress: told what all have finished: what has a lower number, but for one batch that each of the others may be in.
    """
    finished = 0
    for number in numbers:
        before = max(number - others, 0)
        progress.advance(chain.from_iterable(batches[finished:before]))
        finished = before
        if number >= len(batches):
            return
        yield batches[number]


def in_step(shares: Sequence[Sequence[Sequence[Sample]]], rank: int, progress: Progress) -> Iterator[Sequence[Sample]]:
    """The batches of this process, one for each round, empty in rounds that only others need.

    Args:
        shares: the batches of each process, the same on each.
        rank: whose batches are wanted.
        progress: told what all have finished: every process is in the same round.
    """
    for batches in zip_longest(*shares, fillvalue=()):
        yield batches[rank]
        progress.advance(chain.from_iterable(batches))


def measure(
    extract: Extract, take: Take, batches: Iterable[Sequence[Sample]], tokens_per_batch: int, collate: Collate
) -> int:
    """Measure batches with a model that this process holds whole.

    Args:
        extract: batch to rows of the feature store.
        take: called with every row.
        batches: samples of status `ok`; the next is asked for when the last is finished.
        tokens_per_batch: the budget under which the batches were made.
        collate: makes a batch of samples on the model's device.

    Returns:
        The budget at the end.
    """
    for samples in batches:
        queue = BatchQueue(samples, tokens_per_batch)
        while queue:
            batch = queue.pop()
            rows = _attempt(extract, collate(batch))
            if rows is None and len(batch) > 1:
                queue.put_back(batch)
                tokens_per_batch = queue.tokens_per_batch = padded_tokens(batch) // 2
                logger.warning(
                    "out of memory with %d tokens; going on with batches of %d", padded_tokens(batch), tokens_per_batch
                )
                continue
            for row in rows if rows is not None else [sample_row(batch[0], OUT_OF_MEMORY)]:
                take(row)
    return tokens_per_batch


def measure_in_step(
    extract: Extract, take: Take, batches: Iterable[Sequence[Sample]], filler: Sample, collate: Collate
) -> None:
    """Measure batches with a sharded model, which every process has to run equally often.

    Args:
        extract: batch to rows of the feature store.
        take: called with every row.
        batches: of this process, one for each round, empty where it has none.
        filler: a short sample, measured for nothing where the batch is empty.
        collate: makes a batch of samples on the model's device.

    Raises:
        ModelError: a batch exhausted the memory.
    """
    for batch in batches:
        rows = _attempt(extract, collate(batch or [filler]))
        if rows is None:
            raise ModelError(
                "out of memory with a sharded model", got=f"a batch of {padded_tokens(batch or [filler])} tokens",
                fix="lower --tokens-per-batch or --max-length, or use more GPUs",
            )  # fmt: skip
        if batch:
            for row in rows:
                take(row)


def find_budget(extractor: FeatureExtractor, longest: Sample, collate: Collate, device: torch.device) -> int:
    """A token budget from the memory that the longest sample takes, which per token is the most of any.

    Args:
        extractor: what is going to measure.
        longest: the sample with the longest sequence.
        collate: makes a batch of samples on the model's device.
        device: where the model is.

    Returns:
        Tokens per batch; a fixed number on a CPU, whose memory nobody can measure so.
    """
    if device.type != "cuda":
        return DEFAULT_BUDGET
    batch = [longest]
    before, free = torch.cuda.memory_allocated(device), free_memory(device)
    peak = _attempt(extractor.peak_memory, collate(batch))
    if peak is None:
        return padded_tokens(batch)
    used = max(peak - before, 1)
    fitting = int(SHARE_OF_MEMORY * free / used * padded_tokens(batch))
    return max(padded_tokens(batch), min(fitting, LARGEST_BUDGET))


def padded_tokens(batch: Sequence[Sample]) -> int:
    """Tokens of a batch, padding included.

    Args:
        batch: samples with equally many sequences.
    """
    return sum(len(s.sequences) for s in batch) * max(len(sequence) for s in batch for sequence in s.sequences)


def _attempt(work: Callable[[Batch], T], batch: Batch) -> T | None:
    """What work on a batch gives, or None when the memory did not suffice; then it is free again."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        pass  # the error holds the frames, and with them the tensors, until this block is left
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
