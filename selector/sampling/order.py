"""Order as arithmetic: every order of a training run is a pure function of ids, weights, seed and epoch.

A weighted order without replacement is an exponential race (Efraimidis and Spirakis 2006): sample i rings at E_i / w_i, with
E_i a unit exponential, and the order of ringing is the order of draws. E_i comes from a hash of the sample's id, the seed,
the epoch and the number of the draw, so that nothing has to be remembered between epochs, every rank computes the same
order, and a sample that disappears moves no other one.

The race time (a positive float64, whose bit pattern sorts like its value) is packed into one integer with the position:
one in-place sort then gives an order whose ties fall to the lower position. Ten million samples cost 80 MB this way,
where an argsort of floats costs 160 MB and three times as long; the price is that race times count to 11 bits of exponent
and 29 bits of mantissa.

    K  samples to order       B  samples in a batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt64

BLOCK = 1 << 16
"""Samples hashed at a time: temporaries of half a megabyte stay in the cache."""

SMALLEST_WEIGHT = 1e-280
"""Stands for weight zero: such samples come last, in random order among themselves."""


def id_keys(ids: Iterable[str]) -> UInt64[np.ndarray, " K"]:
    """Hash ids to 64 bits, the same on every machine.

    Args:
        ids: [K] sample ids.

    Returns:
        [K] the first 8 bytes of each id's BLAKE2b digest.
    """
    digest = hashlib.blake2b
    data = b"".join(digest(sample_id.encode(), digest_size=8).digest() for sample_id in ids)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)


def weighted_order(
    keys: UInt64[np.ndarray, " K"],
    weights: Float[np.ndarray, " K"] | None = None,
    *,
    seed: int,
    epoch: int = 0,
    draw: int = 0,
    limit: int | None = None,
) -> Int[np.ndarray, " M"]:
    """Draw samples without replacement, each next one with probability proportional to its weight.

    Args:
        keys: [K] hash of each sample's id, from `id_keys`.
        weights: [K] sampling weights >= 0; all equal when None. Weight zero comes after everything else.
        seed: of the run, >= 0.
        epoch: of the order, >= 0.
        draw: number of the draw within the epoch, for orders that are drawn in parts.
        limit: how many to draw; all K when None.

    Returns:
        [M] distinct positions 0 <= p < K in the order of drawing, M = min(limit, K).

    Source:
        Efraimidis and Spirakis, Weighted random sampling with a reservoir, Information Processing Letters 97 (2006).
    """
    n = len(keys)
    position_bits = np.uint64(max(n - 1, 1).bit_length())
    position_mask = np.uint64((1 << int(position_bits)) - 1)
    salt = np.random.SeedSequence((seed, epoch, draw)).generate_state(1, np.uint64)
    packed = np.empty(n, dtype=np.uint64)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        race = -np.log(_uniform(keys[start:stop] + salt))
        if weights is not None:
            race /= np.maximum(weights[start:stop], SMALLEST_WEIGHT)
        packed[start:stop] = (race.view(np.uint64) << np.uint64(1)) & ~position_mask  # the sign bit is always zero
        packed[start:stop] |= np.arange(start, stop, dtype=np.uint64)
    if limit is not None and limit < n:
        packed = np.partition(packed, limit)[:limit]
    packed.sort()
    packed &= position_mask
    return packed.view(np.int64)


def deal(order: Int[np.ndarray, " K"], labels: Shaped[np.ndarray, " K"], batch_size: int) -> Int[np.ndarray, " K"]:
    """Rearrange an order so that every batch holds its share of each stratum, like cards dealt from a sorted deck.

    Samples are sorted by label and dealt to the batches one at a time. With M batches, F of them full, every full batch
    gets at least floor(c / M) and at most ceil(c / F) of the c samples of a stratum: **where c <= F, no batch gets two**.
    Dealing spreads the head of `order` over all batches, so an order that must keep its head early is dealt in parts.

    Args:
        order: [K] positions, best first.
        labels: [K] stratum of each entry of `order`: its source, or its cluster of near-duplicates.
        batch_size: samples per optimizer step over all ranks, >= 1.

    Returns:
        [K] the same positions in another order.
    """
    n = len(order)
    if n == 0:
        return order
    n_batches = -(-n // batch_size)
    last = n - (n_batches - 1) * batch_size
    is_open = np.ones((batch_size, n_batches), dtype=bool)
    is_open[last:, -1] = False  # a short last batch takes part in the first rounds only
    batch = np.empty(n, dtype=np.int64)
    batch[np.argsort(labels, kind="stable")] = np.nonzero(is_open)[1]
    # Batches come in the order of their first sample, except that a short one stays last.
    first = np.full(n_batches, n, dtype=np.int64)
    np.minimum.at(first, batch, np.arange(n))
    if last < batch_size:
        first[-1] = n
    return order[np.lexsort((np.arange(n), first[batch]))]


@dataclass(frozen=True)
class Groups:
    """How drawn samples are repeated, in the terms of TRL's `RepeatSampler`; the default repeats nothing.

    `Groups(mini_repeat_count=2, batch_size=3, repeat_count=2)` turns the order `4 3 0 1 2 6 5` into

        4 4 3 3 0 0   4 4 3 3 0 0   1 1 2 2 6 6   1 1 2 2 6 6
    """

    mini_repeat_count: int = 1
    """How often each sample comes in a row: the completions of one prompt."""
    batch_size: int = 1
    """Distinct samples of a batch: the prompts of one generation. A short last batch is dropped."""
    repeat_count: int = 1
    """How often a whole batch comes: the steps that its completions serve."""

    def length(self, n: int) -> int:
        """Number of indices that `n` drawn samples become."""
        return n // self.batch_size * self.batch_size * self.mini_repeat_count * self.repeat_count

    def repeat(self, order: Iterable[int]) -> Iterator[int]:
        """Repeat an order, reading from it no further than the batch that is being yielded.

        Args:
            order: samples in the order of drawing.
        """
        draws = iter(order)
        while len(batch := list(islice(draws, self.batch_size))) == self.batch_size:
            for _ in range(self.repeat_count):
                for sample in batch:
                    yield from repeat(sample, self.mini_repeat_count)


def _uniform(x: UInt64[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Map integers to (0, 1) by the finalizer of SplitMix64 (Steele, Lea and Flood 2014); works in `x`."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(11)
    uniform = x.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53
    return uniform
