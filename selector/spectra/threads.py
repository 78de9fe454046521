"""CPU work on many small matrices: one piece per thread instead of all threads on one piece.

Threads that share a small matrix mostly wait for each other; on a machine with other work they wait for a time slice too,
which made a 150 x 150 SVD fifty times slower where two processes shared two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each of which computes with one; the setting comes back afterwards."""
    workers = torch.get_num_threads()
    # the setting is a process's for MKL and a thread's for OpenMP: both places need it
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(workers)


def over_batch(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Apply a function to a batch of matrices, its parts side by side.

    Args:
        function: maps `[n, ...]` to a tensor of the same first dimension, each entry by itself.
        matrices: [N, ...] on any device; on a GPU, and where there are fewer matrices than threads, it is one call.
    """
    workers = torch.get_num_threads()
    if matrices.device.type != "cpu" or workers == 1 or len(matrices) < workers:
        return function(matrices)
    with side_by_side() as pool:
        return torch.cat(list(pool.map(function, matrices.tensor_split(workers))))
