"""`selector score`: measure the gradient spectra of every sample of a data set."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.table import Table
from tyro.conf import OmitArgPrefixes

from selector.cli.command import Command, console
from selector.config import ScoreConfig

if TYPE_CHECKING:
    from selector.store import FeatureStore

EXIT_TOO_MANY_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class ScoreCommand(Command):
    """Measure the gradient spectra of every sample and keep them in a feature store.

    Example: selector score --model Qwen/Qwen2.5-1.5B --data train.jsonl --out features/

    The same command under `accelerate launch -m` uses all GPUs. Run it again to finish what was interrupted.
    """

    name: ClassVar[str] = "score"

    model: str
    """Directory of a checkpoint, or name on the hub."""
    data: str
    """JSONL, JSON, Parquet or CSV file, folder saved by datasets, or name on the hub."""
    out: Path
    """Directory of the feature store."""
    split: str = "train"
    """Which split, where there are several."""
    config: OmitArgPrefixes[ScoreConfig] = field(default_factory=ScoreConfig)
    """How samples are read, batched and measured."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint; never taken from a settings file."""
    allow_pickle: bool = False
    """Accept weights that are not safetensors; never taken from a settings file."""

    def run(self) -> int:
        from accelerate import PartialState

        from selector.data.load import load_rows
        from selector.errors import SelectorError, raise_all
        from selector.scorer import load_model, score_dataset

        state = PartialState()
        problems: list[SelectorError] = []
        dataset = model = tokenizer = None
        try:
            dataset = load_rows(self.data, self.split)
        except SelectorError as error:
            problems.append(error)
        try:
            model, tokenizer = load_model(
                self.model, self.config.dtype, device=state.device,
                trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle,
            )  # fmt: skip
        except SelectorError as error:
            problems.append(error)
        raise_all(problems)
        assert dataset is not None and model is not None and tokenizer is not None
        store = score_dataset(model, tokenizer, dataset, self.out, self.config, command=self.settings())
        return summarize(store, self.config.max_failed) if state.is_main_process else 0


def summarize(store: FeatureStore, max_failed: float) -> int:
    """Print what became of the samples and what it cost.

    Args:
        store: a finished store.
        max_failed: largest share of samples without a score.

    Returns:
        0, or 3 when more samples failed.
    """
    statuses = Counter(store.to_arrow(["status"])["status"].to_pylist())
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
            f"({rate:.1f} samples/s) on {cost['processes']} x {cost['device']}"
        )
    total = sum(statuses.values())
    failed = total - statuses["ok"]
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
