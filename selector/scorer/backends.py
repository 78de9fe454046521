"""Which of torch's attention kernels a scoring pass runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_plans() -> Iterator[None]:
    """No attention by cuDNN, which builds a plan for every new shape of a batch: 0.1 s each for a model of 28 layers, a quarter of the passes.

    Training in batches of one shape profits from it, batches of like length, each of another shape, do not.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
