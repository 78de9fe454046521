"""Where a process's time goes, phase by phase, without making a GPU wait.

On a GPU a phase is what lies between two events of its stream, so that it is the device's time and not the time in which
Python hands out work. A phase inside another counts for both.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FORWARD = "forward"
"""Forward pass of the model and the losses."""
SCORES = "scores"
"""What else forward passes give, with further passes that it needs."""
BACKWARD = "backward"
"""Backward pass, with what hooks do in it."""
FACTORS = "factors"
"""What hooks do in it: reducing inputs and output gradients to small matrices, and sketches."""
SPECTRA = "spectra"
"""Singular values and measures from these matrices."""
WRITING = "writing"
"""Rows and shards."""


class Clocks:
    """Seconds of each phase of one process."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, phase: str, device: torch.device) -> Iterator[None]:
        """Time the block.

        Args:
            phase: what it counts for.
            device: where its work runs.
        """
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - started
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(torch.cuda.current_stream(device))
        yield
        last.record(torch.cuda.current_stream(device))
        self._events.append((phase, first, last))

    def settle(self) -> None:
        """Read the events that have happened; best called while the device is at work on later ones, for it takes milliseconds."""
        while self._events and self._events[0][2].query():
            self._read()

    def seconds(self, phase: str) -> float:
        """Seconds of a phase so far; waits for what the device is at.

        Args:
            phase: which one.
        """
        while self._events:
            self._events[0][2].synchronize()
            self._read()
        return self._seconds[phase]

    def _read(self) -> None:
        phase, first, last = self._events.popleft()
        self._seconds[phase] += first.elapsed_time(last) / 1000
