"""Versions of the libraries that make the numbers, and seeds that are the same on every machine."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "gradient-selector",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "pyarrow",
    "faiss-cpu",
    "faiss-gpu",
    "trl",
)


def versions() -> dict[str, str]:
    """Installed version of each library that can change a number; those that are not installed are left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose out of the run's seed: the same everywhere, unlike `hash`.

    Args:
        parts: the run's seed and words that name the purpose.

    Returns:
        An integer in 0 ... 2**63 - 1.
    """
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@cache
def torch_is_at_least(major: int, minor: int) -> bool:
    """Whether torch has what a version brought.

    Args:
        major: first number of that version.
        minor: second number.
    """
    return tuple(int(part) for part in version("torch").split(".")[:2]) >= (major, minor)
