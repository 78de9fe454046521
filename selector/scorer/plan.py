"""What a run is going to do: samples, layers and identity, with every check passed that needs no model pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from selector.config import ScoreConfig
from selector.data.ids import column_ids, content_hash, content_ids
from selector.data.layout import REFERENCE, Layout, recognize, without_failure
from selector.data.rollouts import one_row_per_rollout
from selector.data.samples import Encoder, Sample
from selector.errors import DataError, SelectorError, raise_all
from selector.forward import Scorer, named_scorers
from selector.gradients.losses import LossSettings
from selector.gradients.targets import Target, find_targets
from selector.runtime import versions
from selector.scorer.attention import joining_problems
from selector.scorer.checks import patched_modules
from selector.scorer.models import model_fingerprint, tokenizer_fingerprint
from selector.scorer.processes import divided
from selector.scorer.sharding import is_sharded, wants_sharding
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
    """The layer table; empty where no spectra are wanted."""
    scorers: Mapping[str, Scorer]
    """What else is computed, by name."""
    manifest: Manifest
    layout: Layout
    loss: LossSettings
    rows: tuple[str, ...]
    """Content hash, and id where the user gives one, of every row of the data set: what recognizes the data set later."""
    duplicates: int
    """Rows whose content another row has too, beyond the first."""


def plan(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    config: ScoreConfig,
    reference: nn.Module | None = None,
    state: PartialState | None = None,
) -> Plan:
    """Encode the data set and check everything that can be checked without running the model.

    Args:
        model: a causal language model, loaded.
        tokenizer: its tokenizer.
        dataset: rows in a fixed order.
        config: settings of the run.
        reference: the DPO loss's reference model; the model itself when None and the data set has none of its numbers.
        state: place of this process among those that plan the same and share the tokenizing; it is alone when None.

    Raises:
        SelectorError: whatever is wrong with layers, columns or samples; all problems at once.
    """
    problems: list[SelectorError] = patched_modules(model)
    if config.padding_free:
        problems += joining_problems(model, sharded=wants_sharding() or is_sharded(model))
        if reference is not None:
            problems += joining_problems(reference, sharded=is_sharded(reference))
    targets: list[Target] = []
    scorers: Mapping[str, Scorer] = {}
    try:
        scorers = named_scorers(config.scorers)
    except SelectorError as error:
        problems.append(error)
    try:
        if "spectra" in config.scorers:
            targets = find_targets(
                model, config.projections, config.layers, names=config.layer_names, adapter=config.adapter
            )
    except SelectorError as error:
        problems.append(error)
    try:
        layout = recognize(dataset.column_names, config)
    except SelectorError as error:
        raise_all([*problems, error])
        raise
    problems += _problems_of_reference(layout, reference)
    if layout.format == "rollouts" and config.unit == "rollout":
        dataset = one_row_per_rollout(dataset, layout)
        layout = recognize(dataset.column_names, dataclasses.replace(config, format="rollout", columns=()))
    limits = (config.max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    max_length = min(limit for limit in limits if limit is not None)
    hashes = [
        content_hash(row) for row in tqdm(layout.rows(dataset), "reading", len(dataset), leave=False, disable=None)
    ]
    ids = content_ids(hashes)
    if layout.id_column is not None:
        try:
            ids = column_ids(dataset[layout.id_column], layout.id_column)
        except SelectorError as error:
            problems.append(error)
    sources = (
        [None if s is None else str(s) for s in dataset[layout.source_column]]
        if layout.source_column
        else [None] * len(dataset)
    )
    encoder = Encoder(tokenizer, max_length, config.truncation, layout.loss)
    count = min(config.limit or len(dataset), len(dataset))

    def encode(rows: range) -> list[Sample]:
        encoded = encoder.encode(layout.rows(dataset.select(rows)), ids, sources, rows.start)
        return list(tqdm(encoded, "tokenizing", len(rows), leave=False, disable=None))

    samples = tuple(encode(range(count)) if state is None else divided(encode, count, state))
    problems += _problems_of_samples(samples, max_length, layout, config)
    raise_all(problems)
    rows = tuple(f"{digest} {i}" for digest, i in zip(hashes, ids, strict=True)) if layout.id_column else tuple(hashes)
    data = lineage.begin(rows)
    identity = config.identity() | {
        "format": layout.format,
        "columns": [f"{role}={column}" for role, column in layout.columns.items()],
        "source_column": layout.source_column,
        "loss": layout.loss,
        "reference": None if reference is None else model_fingerprint(reference),
        "max_length": max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": data[0]["fingerprint"],
    }
    del identity[
        "scorers"
    ]  # the layer table and `scores` tell; stores of spectra alone are as before there was a choice
    if scorers or not targets:
        identity["scores"] = {name: {"higher_first": s.higher_first, "unit": s.unit} for name, s in scorers.items()}
    manifest = Manifest(
        identity=identity, layers=tuple(target.spec for target in targets), expected=count, data=data,
        execution=config.execution(), versions=versions(),
    )  # fmt: skip
    loss = LossSettings(name=layout.loss, beta=config.beta, normalizer=config.normalizer, max_length=max_length)
    return Plan(
        samples, tuple(targets), scorers, manifest, layout, loss, rows, duplicates=len(hashes) - len(set(hashes))
    )


def _problems_of_reference(layout: Layout, reference: nn.Module | None) -> list[SelectorError]:
    """Why a reference model does not belong to this data set."""
    if reference is None:
        return []
    if layout.loss != "dpo":
        return [
            DataError(
                "a reference model has no effect",
                got=layout.describe(),
                allowed="preference pairs with --loss dpo",
                fix="leave it out",
            )
        ]
    stored = [layout.columns[role] for role in REFERENCE if role in layout.columns]
    if stored:
        return [
            DataError("there are two references", got=f"a reference model, and columns {', '.join(stored)}", allowed="one of them",
                      fix="leave the model out, or drop the columns")
        ]  # fmt: skip
    return []


def _problems_of_samples(
    samples: Sequence[Sample], max_length: int, layout: Layout, config: ScoreConfig
) -> list[SelectorError]:
    """Why this data set should not be scored as it is."""
    problems: list[SelectorError] = []
    long = [s for s in samples if s.status == "too_long"]
    if long and config.truncation == "error":
        shown = ", ".join(f"{s.sample_id} (row {s.row}) {s.n_tokens} tokens" for s in long[:EXAMPLES_SHOWN])
        problems.append(
            DataError(f"{len(long)} samples are longer than the maximum", got=shown, allowed=f"{max_length} tokens",
                      fix="raise --max-length, or choose --truncation truncate-prompt, truncate-completion or skip")
        )  # fmt: skip
    fine = without_failure(layout.loss)
    failed = [s for s in samples if s.status not in fine and not (s in long and config.truncation == "error")]
    if len(failed) > config.max_failed * len(samples):
        kinds = ", ".join(f"{count} {status}" for status, count in Counter(s.status for s in failed).most_common())
        shown = ", ".join(f"{s.sample_id} (row {s.row})" for s in failed[:EXAMPLES_SHOWN])
        problems.append(
            DataError(f"{len(failed)} of {len(samples)} samples cannot be scored", got=f"{kinds}; first: {shown}",
                      allowed=f"{config.max_failed:.1%} of the samples; a completion must not be empty",
                      fix="repair or remove these rows, or raise --max-failed")
        )  # fmt: skip
    return problems
