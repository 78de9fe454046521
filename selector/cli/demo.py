"""`selector demo`: the whole path on the embedded model and rows, from scores to two short trainings."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.table import Table

from selector.cli.command import Command, console
from selector.errors import ConfigError

if TYPE_CHECKING:
    import datasets

    from selector.selection import Selection

NEEDED = {"faiss": "faiss-cpu", "trl": "trl"}
"""Modules of optional extras that the demo uses, and the extras."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand(Command):
    """Score, index, select and train on real rows with a tiny model, both of which ship with the package.

    Example: selector demo

    Takes about two minutes on two CPU cores and needs no network.
    """

    name: ClassVar[str] = "demo"

    out: Path = Path("runs/demo")
    """Where everything is kept; a second run reuses the scores."""
    budget: str = "20%"
    """How much of the pool to train on."""
    epochs: int = 3
    """Passes over each subset."""
    learning_rate: float = 5e-4
    """Of both trainings."""
    seed: int = 0
    """Of the random subset and of both trainings."""

    def run(self) -> int:
        missing = [extra for module, extra in NEEDED.items() if find_spec(module) is None]
        if missing:
            raise ConfigError(
                "the demo needs more packages",
                got="without " + ", ".join(missing),
                fix=f"pip install 'gradient-selector[{','.join(missing)}]'",
            )
        import datasets
        from transformers.utils import logging

        from selector.assets import HELD_OUT, POOL, TINY_MODEL
        from selector.cli.select import explain
        from selector.config import ScoreConfig
        from selector.data.load import load_rows
        from selector.index import GradientIndex
        from selector.scorer import load_model, score_dataset
        from selector.scores import score, write_scores
        from selector.selecting import matched_random, select

        datasets.disable_progress_bars()  # those of scoring and training are enough for so few rows
        logging.disable_progress_bar()
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
        out, started = console(), time.perf_counter()
        pool, held_out = load_rows(str(POOL)), load_rows(str(HELD_OUT))
        model, tokenizer = load_model(str(TINY_MODEL))
        out.rule(f"1. score {len(pool)} rows: GSM8K and Dolly, {model.num_parameters() / 1e6:.1f} M parameters")
        store = score_dataset(model, tokenizer, pool, self.out / "features", ScoreConfig(id_column="id"))
        cost = store.manifest.cost[-1]
        out.print(
            f"{len(store.layers)} gradient spectra per row, {cost['seconds']:.0f} s, {cost['samples'] / cost['seconds']:.1f} samples/s"
        )

        out.rule("2. index the spectra")
        scores = score(store, "effective_rank", control="length")
        write_scores(self.out / "scores.parquet", {"effective_rank": scores})
        index = GradientIndex.build(store, scores=scores)
        index.save(self.out / "index")
        out.print(index.description)

        out.rule(f"3. select {self.budget}")
        selection = select(scores, budget=self.budget, policy="top", seed=self.seed)
        random = matched_random(selection, scores, seed=self.seed)
        selection.save(self.out / "selection.parquet")
        random.save(self.out / "matched_random.parquet")
        explain(out, scores, selection)
        best = selection.ids[0]
        (nearest, similarities), *_ = index.search_ids([best], k=3)
        out.print(
            f"best: {best}; its spectra are most like those of "
            + ", ".join(f"{i} ({s:.2f})" for i, s in zip(nearest, similarities, strict=True))
        )

        out.rule("4. train on each subset with TRL")
        table = Table("trained on", "samples", "tokens", "held-out loss (nats/token)", "training s", "samples/s")
        table.add_row("nothing (base)", "0", "0", f"{self._train(pool, held_out, None)['eval_loss']:.4f}", "-", "-")
        losses = {}
        for name, chosen in (("selected", selection), ("random", random)):
            result = self._train(pool, held_out, chosen)
            losses[name] = result["eval_loss"]
            table.add_row(
                name, str(len(chosen)), f"{chosen.n_tokens.sum():,}", f"{result['eval_loss']:.4f}",
                f"{result['train_runtime']:.1f}", f"{result['train_samples_per_second']:.1f}",
            )  # fmt: skip
        out.print(table)
        lower = min(losses, key=losses.__getitem__)
        out.print(
            f"{lower} has the lower held-out loss, by {abs(losses['selected'] - losses['random']):.4f}: one seed of a tiny model, no evidence for either"
        )
        out.print(
            f"everything lies in {self.out}/: features/ index/ scores.parquet selection.parquet matched_random.parquet"
        )
        out.print(f"look closer: selector info {self.out}/features, selector search {self.out}/index --ids {best}")
        out.print(
            f"as a page: selector report {self.out}/features {self.out}/selection.parquet --out {self.out}/report.html"
        )
        out.print(f"{time.perf_counter() - started:.0f} s in all")
        return 0

    def _train(self, pool: datasets.Dataset, held_out: datasets.Dataset, selection: Selection | None) -> dict[str, Any]:
        """Held-out loss of the embedded model after training on a selection, or as it is."""
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

        from selector.assets import TINY_MODEL
        from selector.integrations.trl import attach  # pyright: ignore[reportMissingImports]
        from selector.scorer import load_model

        model, tokenizer = load_model(str(TINY_MODEL), "float32")
        args = SFTConfig(
            output_dir=str(self.out / "training"), report_to=[], save_strategy="no", logging_strategy="no", seed=self.seed,
            per_device_train_batch_size=8, per_device_eval_batch_size=16, num_train_epochs=self.epochs, learning_rate=self.learning_rate,
            use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=pool, eval_dataset=held_out, processing_class=tokenizer
        )
        metrics: dict[str, Any] = {}
        if selection is not None:
            attach(trainer, selection, id_column="id")
            metrics |= trainer.train().metrics
            metrics["train_samples_per_second"] = len(selection) * self.epochs / metrics["train_runtime"]
        return metrics | trainer.evaluate()
