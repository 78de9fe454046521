"""`selector score`: measure the gradient spectra of every sample of a data set."""

from __future__ import annotations

import atexit
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.table import Table
from tyro.conf import OmitArgPrefixes

from selector.cli.command import Command, console
from selector.cli.inspect import time_by_phase
from selector.config import ScoreConfig
from selector.data.layout import without_failure

if TYPE_CHECKING:
    from selector.scorer.cost import Estimate
    from selector.scorer.plan import Plan
    from selector.store import FeatureStore

EXIT_TOO_MANY_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class ScoreCommand(Command):
    """Measure the gradient spectra of every sample and keep them in a feature store.

    Example: selector score --model Qwen/Qwen2.5-1.5B --data train.jsonl --out features/

    The same command under `accelerate launch -m` uses all GPUs. Run it again to finish what was interrupted.
    `--with spectra ifd` computes other scores beside the spectra, `--with loss ifd` instead of them, by forward passes alone.
    """

    name: ClassVar[str] = "score"

    model: str
    """Directory of a checkpoint, or name on the hub."""
    data: str
    """JSONL, JSON, Parquet or CSV file, folder saved by datasets, or name on the hub."""
    out: Path
    """Directory of the feature store."""
    dry_run: bool = False
    """Do all checks, measure a few batches, say what the run would cost, and write nothing."""
    split: str = "train"
    """Which split, where there are several."""
    explain: tuple[str, ...] = ()
    """Samples, by id, whose tokens and whole spectra are kept for `selector report`; a finished store is not scored again."""
    reference_model: str | None = None
    """Reference model of the DPO loss, where the data set has no log-probabilities of one; else the model itself."""
    chat_template: Path | None = None
    """Jinja file that takes the place of the tokenizer's chat template, such as one that marks what the assistant generates."""
    config: OmitArgPrefixes[ScoreConfig] = field(default_factory=ScoreConfig)
    """How samples are read, batched and measured."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint; never taken from a settings file."""
    allow_pickle: bool = False
    """Accept weights that are not safetensors; never taken from a settings file."""

    def run(self) -> int:
        from selector.data.load import load_rows
        from selector.errors import SelectorError, raise_all
        from selector.forward import named_scorers
        from selector.scorer import check_explainable, estimate_run, explain, load_model, score_dataset
        from selector.scorer.processes import process_state, together
        from selector.scorer.sharding import wants_sharding

        state = process_state()
        if not state.is_main_process:
            logging.getLogger("selector").setLevel(logging.WARNING)
        problems: list[SelectorError] = []
        dataset = model = tokenizer = reference = None
        with together(state):
            try:
                named_scorers(self.config.scorers)
                if self.explain:
                    check_explainable(self.config)
            except SelectorError as error:
                problems.append(error)
            try:
                dataset = load_rows(self.data, self.split)
            except SelectorError as error:
                problems.append(error)
            try:
                model, tokenizer = load_model(
                    self.model, self.config.dtype, device="cpu" if wants_sharding() else str(state.device),
                    attention=self.config.attention, chat_template=self.chat_template, trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle,
                )  # fmt: skip
            except SelectorError as error:
                problems.append(error)
            try:
                if self.reference_model is not None:
                    reference, _ = load_model(
                        self.reference_model, self.config.dtype, device=state.device or "cpu", attention=self.config.attention,
                        trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle,
                    )  # fmt: skip
            except SelectorError as error:
                problems.append(error)
            raise_all(problems)
        assert dataset is not None
        assert model is not None
        assert tokenizer is not None
        if self.dry_run:
            plan, estimate = estimate_run(model, tokenizer, dataset, self.out, self.config, reference)
            if state.is_main_process:
                show_estimate(plan, estimate)
            code = 0
        else:
            store = score_dataset(
                model, tokenizer, dataset, self.out, self.config, command=self.settings(), reference=reference
            )
            if self.explain and state.is_main_process:
                explain(model, tokenizer, dataset, self.out, self.explain, self.config, reference)
            code = summarize(store, self.config.max_failed) if state.is_main_process else 0
        # a process that leaves its group open may abort, with its work done
        atexit.register(state.destroy_process_group)
        return code

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name not in ("dry_run", "explain")}


def show_estimate(plan: Plan, estimate: Estimate | None) -> None:
    """Print what a run would do and cost.

    Args:
        plan: its samples and layers.
        estimate: its cost; None when nothing is left to measure.
    """
    from selector.scorer.progress import duration

    table = Table("", "", title="dry run: nothing was written", show_header=False)
    layers = {target.spec.layer for target in plan.targets}
    projections = list(dict.fromkeys(target.spec.projection for target in plan.targets))
    if layers:
        table.add_row("layers matched", f"{len(layers)} layers: {', '.join(projections)}; {len(plan.targets)} matrices")
    table.add_row("scores", ", ".join(["loss", *plan.scorers]) + ("" if layers else "; no backward pass, no spectra"))
    statuses = Counter(sample.status for sample in plan.samples)
    table.add_row("samples", ", ".join(f"{count:,} {status}" for status, count in statuses.most_common()))
    table.add_row("truncated", f"{sum(sample.truncated for sample in plan.samples):,}")
    table.add_row("repeated rows", f"{plan.duplicates:,}")
    if estimate is None:
        table.add_row("left to measure", "nothing")
    else:
        table.add_row("left to measure", f"{estimate.samples:,} samples, {estimate.tokens:,} tokens")
        table.add_row("time", f"about {duration(estimate.seconds)}, {estimate.tokens / estimate.seconds:,.0f} tokens/s")
        table.add_row(
            "cost", f"{estimate.epoch_ratio:.2f} times an epoch of training on them (reckoned as three forward passes)"
        )
        table.add_row("batches", f"{estimate.tokens_per_batch:,} tokens")
        if estimate.peak_memory is not None:
            table.add_row("peak memory", f"{estimate.peak_memory / 2**30:.1f} GiB per device")
        table.add_row("store", f"about {estimate.store_bytes / 2**20:,.1f} MiB")
    console().print(table)


def summarize(store: FeatureStore, max_failed: float) -> int:
    """Print what became of the samples and what it cost.

    Args:
        store: a finished store.
        max_failed: largest share of samples without a score.

    Returns:
        0, or 3 when more samples failed.
    """
    statuses = Counter(store.to_arrow(["status"])["status"].to_pylist())
    total = sum(statuses.values())
    table = Table("status", "samples", title=f"feature store {store.path}")
    for status, count in statuses.most_common():
        table.add_row(status, f"{count:,}")
    out = console()
    out.print(table)
    if store.manifest.cost:
        cost = store.manifest.cost[-1]
        rate = cost["samples"] / max(cost["seconds"], 1e-9)
        out.print(
            f"last run: {cost['samples']:,} samples, {cost['tokens']:,} tokens in {cost['seconds']:.1f} s "
            f"({rate:.1f} samples/s) on {cost['processes']} x {cost['device']}, {cost['device_seconds']:,.0f} device seconds; "
            f"{cost['epoch_ratio'] or 0:.2f} times an epoch of training; {cost['store_bytes'] / max(total, 1):,.0f} bytes per sample"
        )
        out.print(f"time: {time_by_phase(cost)}")
    failed = total - sum(statuses[status] for status in without_failure(store.manifest.identity["loss"]))
    if failed > max_failed * total:
        print(
            f"error: {failed} of {total} samples have no score\n"
            f"  got:     {', '.join(f'{n} {status}' for status, n in statuses.items() if status != 'ok')}\n"
            f"  allowed: {max_failed:.1%}\n"
            "  fix:     nonfinite: check the model's weights, or use --dtype float32; else repair these rows, or raise --max-failed",
            file=sys.stderr,
        )
        return EXIT_TOO_MANY_FAILED
    return 0
