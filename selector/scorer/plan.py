"""What a run is going to do: samples, layers and identity, with every check passed that needs no model pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from selector.config import ScoreConfig
from selector.data.ids import column_ids, content_hash, content_ids
from selector.data.layout import Layout, recognize
from selector.data.samples import Encoder, Sample
from selector.errors import DataError, SelectorError, raise_all
from selector.gradients.targets import Target, find_targets
from selector.runtime import versions
from selector.scorer.checks import patched_modules
from selector.scorer.models import model_fingerprint, tokenizer_fingerprint
from selector.store import lineage
from selector.store.schema import Manifest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a run is going to do, with every check passed."""

    samples: tuple[Sample, ...]
    targets: tuple[Target, ...]
    manifest: Manifest
    layout: Layout
    rows: tuple[str, ...]
    """Content hash, and id where the user gives one, of every row of the data set: what recognizes the data set later."""
    duplicates: int
    """Rows whose content another row has too, beyond the first."""


def plan(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: datasets.Dataset, config: ScoreConfig) -> Plan:
    """Encode the data set and check everything that can be checked without running the model.

    Args:
        model: a causal language model, loaded.
        tokenizer: its tokenizer.
        dataset: rows in a fixed order.
        config: settings of the run.

    Raises:
        SelectorError: whatever is wrong with layers, columns or samples; all problems at once.
    """
    problems: list[SelectorError] = patched_modules(model)
    targets: list[Target] = []
    try:
        targets = find_targets(model, config.projections, config.layers, names=config.layer_names, adapter=config.adapter)
    except SelectorError as error:
        problems.append(error)
    try:
        layout = recognize(dataset.column_names, config)
    except SelectorError as error:
        raise_all([*problems, error])
        raise
    limits = (config.max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    max_length = min(limit for limit in limits if limit is not None)
    hashes = [content_hash(row) for row in tqdm(layout.rows(dataset), "reading", len(dataset), leave=False, disable=None)]
    ids = content_ids(hashes)
    if layout.id_column is not None:
        try:
            ids = column_ids(dataset[layout.id_column], layout.id_column)
        except SelectorError as error:
            problems.append(error)
    sources = [None if s is None else str(s) for s in dataset[layout.source_column]] if layout.source_column else [None] * len(dataset)
    encoder = Encoder(tokenizer, max_length, config.truncation)
    count = min(config.limit or len(dataset), len(dataset))
    encoded = encoder.encode(layout.rows(dataset, config.limit), ids, sources)
    samples = tuple(tqdm(encoded, "tokenizing", count, leave=False, disable=None))
    problems += _problems_of_samples(samples, max_length, config)
    raise_all(problems)
    rows = tuple(f"{digest} {i}" for digest, i in zip(hashes, ids, strict=True)) if layout.id_column else tuple(hashes)
    data = lineage.begin(rows)
    identity = config.identity() | {
        "format": layout.format,
        "columns": [f"{role}={column}" for role, column in layout.columns.items()],
        "source_column": layout.source_column,
        "max_length": max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": data[0]["fingerprint"],
    }
    manifest = Manifest(
        identity=identity, layers=tuple(target.spec for target in targets), expected=count, data=data,
        execution=config.execution(), versions=versions(),
    )  # fmt: skip
    return Plan(samples, tuple(targets), manifest, layout, rows, duplicates=len(hashes) - len(set(hashes)))


def _problems_of_samples(samples: Sequence[Sample], max_length: int, config: ScoreConfig) -> list[SelectorError]:
    """Why this data set should not be scored as it is."""
    problems: list[SelectorError] = []
    long = [s for s in samples if s.status == "too_long"]
    if long and config.truncation == "error":
        shown = ", ".join(f"{s.sample_id} (row {s.row}) {s.n_tokens} tokens" for s in long[:EXAMPLES_SHOWN])
        problems.append(
            DataError(f"{len(long)} samples are longer than the maximum", got=shown, allowed=f"{max_length} tokens",
                      fix="raise --max-length, or choose --truncation truncate-prompt, truncate-completion or skip")
        )  # fmt: skip
    failed = [s for s in samples if s.status != "ok" and not (s in long and config.truncation == "error")]
    if len(failed) > config.max_failed * len(samples):
        kinds = ", ".join(f"{count} {status}" for status, count in Counter(s.status for s in failed).most_common())
        shown = ", ".join(f"{s.sample_id} (row {s.row})" for s in failed[:EXAMPLES_SHOWN])
        problems.append(
            DataError(f"{len(failed)} of {len(samples)} samples cannot be scored", got=f"{kinds}; first: {shown}",
                      allowed=f"{config.max_failed:.1%} of the samples; a completion must not be empty",
                      fix="repair or remove these rows, or raise --max-failed")
        )  # fmt: skip
    return problems
