"""Score a data set: check everything, then measure what is not measured yet, shard by shard.

Every process encodes the data set and computes the same plan; each then works through its own share without waiting for
the others. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from selector.batching import collate, deal, token_budget_batches
from selector.config import ScoreConfig, save_yaml
from selector.data.ids import column_ids, content_hash, content_ids
from selector.data.layout import Layout, recognize
from selector.data.samples import Encoder, Sample
from selector.errors import DataError, SelectorError, raise_all
from selector.gradients.targets import Target, find_targets
from selector.runtime import versions
from selector.scorer.features import FeatureExtractor, sample_row
from selector.scorer.models import model_fingerprint, tokenizer_fingerprint
from selector.store.reader import FeatureStore
from selector.store.schema import CONFIG, MANIFEST, Manifest, fingerprint
from selector.store.writer import StoreWriter, create_or_check, write_atomically

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("selector")

EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a run is going to do, with every check passed."""

    samples: tuple[Sample, ...]
    targets: tuple[Target, ...]
    manifest: Manifest
    layout: Layout
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
    problems: list[SelectorError] = []
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
    identity = config.identity() | {
        "format": layout.format,
        "columns": [f"{role}={column}" for role, column in layout.columns.items()],
        "source_column": layout.source_column,
        "max_length": max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint([hashes, ids if layout.id_column else None]),
    }
    manifest = Manifest(
        identity=identity, layers=tuple(target.spec for target in targets), expected=count,
        execution=config.execution(), versions=versions(),
    )  # fmt: skip
    return Plan(samples, tuple(targets), manifest, layout, duplicates=len(hashes) - len(set(hashes)))


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


def score_dataset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    out: str | Path,
    config: ScoreConfig | None = None,
    command: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """Measure the gradient spectra of every sample and keep them in a feature store.

    The model is put back as it was. A store that an earlier call began is finished; samples that it holds are not
    measured again. Under `accelerate launch` or `torchrun` the processes share the work.

    Args:
        model: a causal language model on this process's device.
        tokenizer: its tokenizer.
        dataset: rows in a fixed order.
        out: directory of the store, new or begun by an equal run.
        config: settings; the defaults when None.
        command: what `config.yaml` records for `selector run`; the settings alone when None.

    Returns:
        The finished store.

    Raises:
        SelectorError: a check failed, before anything was written; or the store belongs to another run.
    """
    config = config or ScoreConfig()
    store = Path(out)
    state = PartialState()
    work = plan(model, tokenizer, dataset, config)
    logger.info("data set: %d samples; %s", len(work.samples), work.layout.describe())
    if work.duplicates:
        logger.info("%d rows repeat the content of another row; ids keep them apart", work.duplicates)
    manifest = _begin(store, work.manifest, state)
    if state.is_main_process:
        settings = config.identity() | config.execution()
        save_yaml(store / CONFIG, command or {"command": "score", "config": settings}, f"replay with: selector run {store}")
    finished = _finished_ids(store, manifest, state)
    pending = [sample for sample in work.samples if sample.sample_id not in finished]
    if finished:
        logger.info("%d samples are scored already, %d are left", len(work.samples) - len(pending), len(pending))
    mine = deal(pending, state.num_processes)[state.process_index]
    writer = StoreWriter(store, manifest, rank=state.process_index, shard_rows=config.shard_rows)
    started = time.perf_counter()
    _measure(model, tokenizer, work.targets, mine, writer, config, state)
    state.wait_for_everyone()
    if state.is_main_process:
        entry = _ledger_entry(pending, time.perf_counter() - started, state)
        shards = tuple(path.name for path in FeatureStore(store, manifest).shard_paths())
        manifest = dataclasses.replace(manifest, shards=shards, cost=(*manifest.cost, entry) if pending else manifest.cost)
        write_atomically(store / MANIFEST, manifest.to_json().encode())
    state.wait_for_everyone()
    return FeatureStore.open(store)


def _begin(store: Path, manifest: Manifest, state: PartialState) -> Manifest:
    """Create or check the store on the main process; all processes get its manifest or its refusal."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [create_or_check(store, manifest)]
        except SelectorError as error:
            outcome = [error]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], SelectorError):
        raise outcome[0]
    return outcome[0]


def _finished_ids(store: Path, manifest: Manifest, state: PartialState) -> set[str]:
    """Ids in the shards that any process can see."""
    ids = {i for table in FeatureStore(store, manifest).shards(["sample_id"]) for i in table["sample_id"].to_pylist()}
    if state.num_processes > 1:
        ids = set(gather_object(list(ids)))
        state.wait_for_everyone()
    return ids


def _measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, targets: Sequence[Target], samples: Sequence[Sample],
    writer: StoreWriter, config: ScoreConfig, state: PartialState,
) -> None:  # fmt: skip
    """Measure one process's share and write it."""
    for sample in samples:
        if sample.status != "ok":
            writer.add(sample_row(sample, sample.status))
    batches = token_budget_batches([s for s in samples if s.status == "ok"], config.tokens_per_batch)
    extractor = FeatureExtractor(model, targets, config.precision)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    device = next(model.parameters()).device
    # every process shows its share of the whole only through the first: shares are equal in tokens
    progress = tqdm(
        total=sum(s.n_tokens for batch in batches for s in batch), desc="scoring", unit="tok", unit_scale=True,
        disable=not state.is_main_process, mininterval=0.5, leave=False,
    )  # fmt: skip
    done = 0
    with extractor.attached(), progress:
        for batch in batches:
            for row in extractor(collate(batch, pad_token_id, device)):
                writer.add(row)
            done += len(batch)
            progress.set_postfix_str(f"{done} of {sum(map(len, batches))} samples", refresh=False)
            progress.update(sum(sample.n_tokens for sample in batch))
    writer.flush()


def _ledger_entry(samples: Sequence[Sample], seconds: float, state: PartialState) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": len(samples),
        "tokens": sum(sample.n_tokens for sample in samples),
        "seconds": round(seconds, 3),
        "processes": state.num_processes,
        "device": device,
    }
