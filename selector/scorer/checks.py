"""Refuse to write wrong numbers: patched models before the run, and a self-test on two real samples at its start.

The self-test measures two samples alone and together in one padded batch. What differs beyond rounding would make every
score depend on its batch mates: a wrong mask, dropout, batch statistics, a kernel that drops tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from selector.data.samples import Sample
from selector.errors import ModelError, NumericalError, SelectorError, raise_all
from selector.scorer.measure import Collate, Extract, padded_tokens
from selector.types import MEASURES

PATCHES = {"liger_kernel": "Liger", "unsloth": "Unsloth", "cut_cross_entropy": "Cut Cross-Entropy"}
"""Libraries whose replaced forward passes overwrite activations in place, or give a loss but no logits."""

TOLERANCE_32_BIT = 1e-4
TOLERANCE_16_BIT = 5e-2
"""Largest relative difference between a sample alone and in a batch, over the layers of a measure taken as one vector."""

NEGLIGIBLE = 1e-6
"""Layers whose gradient is smaller than this share of the sample's largest hold rounding alone."""

SELF_TEST_TOKENS = 1024
"""Longest sample that the self-test takes where there is a choice."""


def patched_modules(model: nn.Module) -> list[SelectorError]:
    """Modules whose forward pass another library has replaced by one that cannot be observed.

    Args:
        model: any model.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        forward = getattr(module.forward, "__func__", module.forward)
        for library in (forward.__module__.split(".")[0], type(module).__module__.split(".")[0]):
            if library in PATCHES:
                found.setdefault(PATCHES[library], name or type(model).__name__)
    return [
        ModelError(f"{library} has replaced forward passes of this model", got=module, allowed="the model as transformers builds it",
                   fix=f"load it without {library} for scoring; train with it as you like")
        for library, module in found.items()
    ]  # fmt: skip


def self_test(extract: Extract, samples: Sequence[Sample], collate: Collate, dtype: torch.dtype) -> float:
    """Measure two samples alone and together and compare.

    Args:
        extract: batch to rows of the feature store.
        samples: of status `ok`, one or more.
        collate: makes a batch of samples on the model's device.
        dtype: of the model.

    Returns:
        The largest relative difference found.

    Raises:
        NumericalError: it is beyond the tolerance of the model's number format; with the numbers.
    """
    tolerance = TOLERANCE_32_BIT if dtype.itemsize >= 4 else TOLERANCE_16_BIT
    pair = _two_lengths(samples)
    alone = [extract(collate([sample]))[0] for sample in pair]
    together = extract(collate(pair))
    problems: list[SelectorError] = []
    worst = 0.0
    for sample, first, second in zip(pair, alone, together, strict=True):
        where = f"sample {sample.sample_id} (row {sample.row}, {sample.n_tokens} tokens)"
        if first["status"] != second["status"]:
            problems.append(
                NumericalError(f"self-test: {where} is {first['status']} alone and {second['status']} in a batch")
            )
            continue
        for name, difference in _differences(first, second).items():
            worst = max(worst, difference)
            if not difference <= tolerance:
                problems.append(
                    NumericalError(
                        f"self-test: {name} of {where} depends on its batch mates",
                        got=f"relative difference {difference:.2g} between alone and a batch of {padded_tokens(pair)} tokens",
                        allowed=f"{tolerance:g} for a {str(dtype).removeprefix('torch.')} model",
                        fix="check --padding-free and attn_implementation (try sdpa or eager), dropout inside custom modules, and patched kernels",
                    )
                )
    raise_all(problems)
    return worst


def _two_lengths(samples: Sequence[Sample]) -> list[Sample]:
    """A short and a longer sample with equally many sequences, so that the shorter one is padded; one twice where there is but one."""
    alike = [sample for sample in samples if len(sample.sequences) == len(samples[0].sequences)]
    ordered = sorted(alike, key=lambda sample: (sample.n_tokens, sample.row))
    short_enough = [sample for sample in ordered if sample.n_tokens <= SELF_TEST_TOKENS] or ordered[:2]
    return [short_enough[len(short_enough) // 4], short_enough[(3 * len(short_enough)) // 4]]


def _differences(first: dict, second: dict) -> dict[str, float]:
    """Relative difference of each number, and of each measure over the layers that hold more than rounding."""
    if first["status"] != "ok":
        return {}
    present = [name for name in MEASURES if name in first]
    vectors = {name: (first[name], second[name]) for name in present}
    if present:
        norms = first["frobenius_norm"]
        used = norms > NEGLIGIBLE * np.nanmax(norms)
        vectors = {name: (a[used], b[used]) for name, (a, b) in vectors.items()}
    numbers = {name for name, value in first.items() if isinstance(value, float)}
    vectors |= {name: (np.array([first[name]]), np.array([second[name]], dtype=float)) for name in numbers}
    # a loss near zero, such as a group's whose advantages cancel, is compared in nats, and other numbers likewise in their unit
    smallest = dict.fromkeys(present, 1e-30) | dict.fromkeys(numbers, 1.0)
    return {
        name: float(np.linalg.norm(a - b) / max(np.linalg.norm(a), smallest[name])) for name, (a, b) in vectors.items()
    }
