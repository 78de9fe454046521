"""How far a run is: a bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from selector.data.samples import Sample

logger = logging.getLogger("selector")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Samples and tokens of the whole run, whichever process measures them.

    Args:
        samples: what all processes are to measure.
        shown: whether this process is the one that speaks.
    """

    def __init__(self, samples: Sequence[Sample], shown: bool) -> None:
        self.samples, self.tokens, self.shown = len(samples), sum(sample.n_tokens for sample in samples), shown
        self._done_samples = self._done_tokens = 0
        self._started = self._spoken = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=self.samples, desc="scoring", unit="sample", leave=False, disable=not on_terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, samples: Iterable[Sample]) -> None:
        """Count what was finished.

        Args:
            samples: that any process has finished since the last call.
        """
        tokens = [sample.n_tokens for sample in samples]
        self._done_samples += len(tokens)
        self._done_tokens += sum(tokens)
        self._bar.update(len(tokens))
        self._bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
        now = time.monotonic()
        if self.shown and self._bar.disable and now - self._spoken >= SECONDS_BETWEEN_LINES:
            self._spoken = now
            logger.info("%s", self)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self._done_tokens / self.seconds

    def __str__(self) -> str:
        left = (self.tokens - self._done_tokens) / max(self.tokens_per_second, 1e-9)
        rate = self._done_samples / self.seconds
        return (
            f"scoring: {self._done_tokens / max(self.tokens, 1):.0%} of {self.samples:,} samples, "
            f"{rate:,.1f} samples/s, {self.tokens_per_second:,.0f} tokens/s, {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Time in the two largest units that matter.

    Args:
        seconds: any length.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), len(parts) - 1)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2])
