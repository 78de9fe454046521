"""Score a data set: check everything, then measure what is not measured yet, shard by shard.

The processes divide the tokenizing and compute the same plan and the same batches, of which each then takes the next
whenever it is free; where one fails, the others do the rest before all end. Nothing is written before all checks have
passed. Whatever kills a run, the shards that it has renamed are whole, and the same call finishes the rest, on any number
of processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import nn

from selector.batching import Batch, collate, deal, join, token_budget_batches
from selector.config import ScoreConfig
from selector.data.layout import REFERENCE
from selector.data.samples import Sample
from selector.gradients.targets import unmeasured
from selector.scorer.checks import self_test
from selector.scorer.clocks import FORWARD, WRITING
from selector.scorer.cost import Estimate, device_name, estimate, ledger_entry, phases
from selector.scorer.features import FeatureExtractor, sample_row
from selector.scorer.measure import DEFAULT_BUDGET, find_budget, handed_out, in_step, measure, measure_in_step
from selector.scorer.plan import Plan, plan
from selector.scorer.processes import (
    finished_rows,
    from_main,
    of_each,
    on_every_file_system,
    process_state,
    together,
    turns,
)
from selector.scorer.progress import Progress
from selector.scorer.sharding import is_sharded, shard
from selector.spectra import SketchConfig
from selector.store.reader import FeatureStore
from selector.store.schema import Manifest
from selector.store.writer import StoreWriter, check, create, write_manifest

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("selector")


def score_dataset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    out: str | Path,
    config: ScoreConfig | None = None,
    command: Mapping[str, Any] | None = None,
    reference: nn.Module | None = None,
) -> FeatureStore:
    """Measure the gradient spectra of every sample, or what else the settings ask for, and keep them in a feature store.

    The model is put back as it was, except that it stays sharded when `accelerate launch` asks for FSDP or DeepSpeed. A
    store that an earlier call began is finished; samples that it holds are not measured again. Under `accelerate launch`
    or `torchrun` the processes share the work. Nodes without a shared file system each keep a part of the store, which
    `selector merge` joins.

    Args:
        model: a causal language model on this process's device.
        tokenizer: its tokenizer.
        dataset: rows in a fixed order.
        out: directory of the store, new or begun by an equal run.
        config: settings; the defaults when None.
        command: what `config.yaml` records for `selector run`; the settings alone when None.
        reference: the DPO loss's reference model, on the same device; when None, stored log-probabilities of one, else the
            model itself, which is where DPO training starts.

    Returns:
        The finished store.

    Raises:
        SelectorError: a check failed, before anything was written; or the store belongs to another run.
    """
    config, store = config or ScoreConfig(), Path(out)
    begun = time.perf_counter()
    run = _begin(model, tokenizer, dataset, store, config, reference)
    settings = (
        {"command": "score", "config": config.identity() | config.execution()} if command is None else dict(command)
    )
    manifest = replace(run.manifest, command=settings, shards=())
    with run.extractor.attached():
        with run.meeting():
            if run.measurable:
                difference = run.self_test()
                logger.info("self-test: a sample alone and in a batch differ by %.1g at most", difference)
        for turn in on_every_file_system(run.state):
            if turn:
                create(store, manifest)
        started = time.perf_counter()
        with run.meeting():
            budget = run.measure(
                StoreWriter(store, manifest, rank=run.state.process_index, shard_rows=config.shard_rows)
            )
            done = time.perf_counter()
        run.state.wait_for_everyone()
        finished = time.perf_counter()
    clocks = run.extractor.clocks
    mine = phases(clocks, started - begun, done - started, finished - done)
    size = sum(path.stat().st_size for path in FeatureStore(store, manifest).shard_paths())
    entry = from_main(
        ledger_entry(run.pending, finished - started, clocks.seconds(FORWARD), of_each(mine, run.state), budget, size),
        run.state,
    )
    cost = (*manifest.cost, entry) if run.pending else manifest.cost
    for turn in on_every_file_system(run.state):
        names = tuple(path.name for path in FeatureStore(store, manifest).shard_paths())
        if turn and Manifest.load(store).shards != names:
            write_manifest(store, replace(manifest, shards=names, cost=cost))
    return FeatureStore.open(store)


def estimate_run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    out: str | Path,
    config: ScoreConfig | None = None,
    reference: nn.Module | None = None,
) -> tuple[Plan, Estimate | None]:
    """Do all checks and measure a few batches, to say what `score_dataset` would cost; nothing is written.

    Args:
        model: a causal language model on this process's device.
        tokenizer: its tokenizer.
        dataset: rows in a fixed order.
        out: directory where the store would be, or is begun.
        config: settings; the defaults when None.
        reference: as for `score_dataset`.

    Returns:
        The plan and the estimate, which is None when nothing is left to measure.

    Raises:
        SelectorError: a check failed.
    """
    run = _begin(model, tokenizer, dataset, Path(out), config or ScoreConfig(), reference)
    if not run.measurable:
        return run.plan, None
    with run.extractor.attached():
        run.self_test()
        return run.plan, estimate(run.extractor, run.measurable, run.budget(), run.collate, run.device, run.state)


def _begin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    store: Path,
    config: ScoreConfig,
    reference: nn.Module | None,
) -> _Run:
    """Plan, shard the model where that is asked for, and find out what the store already holds."""
    state = process_state()
    with together(state):
        work = plan(model, tokenizer, dataset, config, reference, state)
    logger.info("data set: %d samples; %s", len(work.samples), work.layout.describe())
    if work.layout.loss == "dpo" and not set(REFERENCE) & set(work.layout.columns):
        logger.info(
            "reference of the DPO loss: %s",
            "the model itself, as at the start of training" if reference is None else "the reference model",
        )
    left_out = unmeasured(model, work.targets) if work.targets else []
    if left_out:
        logger.info("linear layers that are not measured: %s", ", ".join(left_out))
    if work.duplicates:
        logger.info("%d rows repeat the content of another row; ids keep them apart", work.duplicates)
    manifest = from_main(work.manifest, state)  # launchers may load weights on the main process alone
    with together(state):
        if state.is_local_main_process:
            manifest = check(store, manifest, work.rows, config.append)
    manifest = from_main(manifest, state)
    finished = finished_rows(store, manifest, state)
    pending = [sample for sample in work.samples if sample.row not in finished]
    if finished:
        logger.info("%d samples are scored already, %d are left", len(work.samples) - len(pending), len(pending))
    dtype = next(model.parameters()).dtype
    model = shard(model)
    sharded = is_sharded(model)
    sketch = SketchConfig(dimension=config.sketch_dimension) if config.sketch_dimension else None
    return _Run(
        plan=work, manifest=manifest, config=config, state=state, pending=pending, sharded=sharded, dtype=dtype,
        device=torch.device(state.device or "cpu") if sharded else next(model.parameters()).device,
        pad_token_id=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0,
        extractor=FeatureExtractor(
            model, work.targets, config.precision, sketch, work.loss, reference, checkpoint=config.checkpoint,
            scorers=work.scorers, bos_token_id=tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None,
        ),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One process's view of a run whose checks have passed."""

    plan: Plan
    manifest: Manifest
    config: ScoreConfig
    state: PartialState
    pending: list[Sample]
    """Samples of all processes that no shard holds."""
    extractor: FeatureExtractor
    sharded: bool
    device: torch.device
    dtype: torch.dtype
    pad_token_id: int
    """Fills the padding; its value has no effect."""

    @property
    def measurable(self) -> list[Sample]:
        """Pending samples that can be measured."""
        return [sample for sample in self.pending if sample.status == "ok"]

    def meeting(self) -> AbstractContextManager[None]:
        """Where a failure is told to all; but a process that fails in a sharded model's layers must end, and with it the job."""
        return nullcontext() if self.sharded else together(self.state)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch on the model's device, padded or joined."""
        return (
            join(samples, self.device) if self.config.padding_free else collate(samples, self.pad_token_id, self.device)
        )

    def self_test(self) -> float:
        """Refuse a model whose samples depend on each other."""
        return self_test(self.extractor, self.measurable, self.collate, self.dtype)

    def budget(self) -> int:
        """Tokens per batch: the user's, else the last that this store saw on such a device, else what the memory allows."""
        if self.config.tokens_per_batch is not None:
            return self.config.tokens_per_batch
        remembered = [entry["tokens_per_batch"] for entry in self.manifest.cost if entry["device"] == device_name()]
        if remembered:
            return remembered[-1]
        if self.sharded:
            logger.info("sharded model: batches of %d tokens; set --tokens-per-batch for others", DEFAULT_BUDGET)
        if self.sharded or not self.measurable:
            return DEFAULT_BUDGET
        longest = max(self.measurable, key=lambda sample: max(map(len, sample.sequences)))
        return find_budget(self.extractor, longest, self.collate, self.device)

    def measure(self, writer: StoreWriter) -> int:
        """Measure what falls to this process and write it; returns the token budget at the end."""
        rank, processes, samples = self.state.process_index, self.state.num_processes, self.measurable
        unmeasurable = [sample for sample in self.pending if sample.status != "ok"]
        with self.meeting():
            for sample in unmeasurable[rank::processes]:
                writer.add(sample_row(sample, sample.status))
            budget = self.budget()
        budget = min(of_each(budget, self.state))
        clocks = self.extractor.clocks
        clocks.clear()  # of the self-test and the search for the budget

        def take(row: dict[str, Any]) -> None:
            with clocks(WRITING, torch.device("cpu")):
                writer.add(row)

        with Progress(samples, shown=self.state.is_main_process) as progress:
            if self.sharded and samples:
                shares = [token_budget_batches(share, budget) for share in deal(samples, processes)]
                filler = min(samples, key=lambda sample: sample.n_tokens)
                measure_in_step(self.extractor, take, in_step(shares, rank, progress), filler, self.collate)
            else:
                batches = token_budget_batches(samples, budget, processes)
                mine = handed_out(batches, turns(self.state), processes - 1, progress)
                budget = measure(self.extractor, take, mine, budget, self.collate)
        with clocks(WRITING, torch.device("cpu")):
            writer.flush()
        return budget
