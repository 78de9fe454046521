"""`selector info` and `selector verify`: what a feature store holds, and whether it is sound."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from rich.table import Table
from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.cli.replay import RunCommand
from selector.errors import StoreError
from selector.store.schema import CONFIG

if TYPE_CHECKING:
    from selector.store import FeatureStore


def time_by_phase(entry: Mapping[str, Any]) -> str:
    """What the time of a run went to, averaged over its processes.

    Args:
        entry: of a store's cost ledger; without phases where an older release wrote it.
    """
    mean = {name: sum(seconds) / len(seconds) for name, seconds in entry.get("phases", {}).items()}
    before = mean.pop("preparing", 0.0)
    whole = max(sum(mean.values()), 1e-9)
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in mean.items())
    return f"{before:.1f} s of preparing; then {shares}" if shares else "not recorded"


@dataclass(frozen=True, kw_only=True)
class InfoCommand(Command):
    """Show what a feature store holds: samples, layers, settings, and the middle of each measure and score.

    Example: selector info features/
    """

    name: ClassVar[str] = "info"

    store: Annotated[Path, Positional]
    """Directory of the feature store."""

    def run(self) -> int:
        from selector.store import FeatureStore

        store = FeatureStore.open(self.store)
        out = console()
        samples = store.to_arrow(["source", "n_tokens", "n_loss_tokens", "status"])
        statuses = Counter(samples["status"].to_pylist())
        out.print(
            f"{store.path}: {len(samples):,} of {store.manifest.expected:,} samples, fingerprint {store.manifest.fingerprint}"
        )
        out.print("status: " + ", ".join(f"{count:,} {status}" for status, count in statuses.most_common()))
        sources = Counter(samples["source"].to_pylist())
        if set(sources) != {None}:
            out.print("source: " + ", ".join(f"{count:,} {source}" for source, count in sources.most_common(8)))
        if len(samples):
            tokens = samples["n_tokens"].to_numpy()
            out.print(f"tokens: {tokens.sum():,} in all; {np.median(tokens):.0f} in the middle, {tokens.max()} at most")
        settings = Table("setting", "value", title="identity")
        for key, value in store.manifest.identity.items():
            settings.add_row(key, str(value))
        out.print(settings)
        runs = Table("finished", "samples", "samples/s", "processes", "time", title="runs")
        for entry in store.manifest.cost:
            rate = entry["samples"] / max(entry["seconds"], 1e-9)
            where = f"{entry['processes']} x {entry['device']}"
            runs.add_row(entry["finished"][:16], f"{entry['samples']:,}", f"{rate:,.1f}", where, time_by_phase(entry))
        if store.manifest.cost:
            out.print(runs)
        if store.layers:
            out.print(_layer_medians(store))
        out.print(_score_medians(store))
        return 0


def _layer_medians(store: FeatureStore) -> Table:
    """The middle of each measure, by projection."""
    from selector.types import MEASURES

    projections = list(dict.fromkeys(spec.projection for spec in store.layers))
    table = Table(
        "measure", *projections, title=f"median over samples and {len({s.layer for s in store.layers})} layers"
    )
    for measure in MEASURES:
        values = store.features(measure)
        columns = [values[:, [s.projection == name for s in store.layers]] for name in projections]
        table.add_row(measure, *(f"{np.nanmedian(c):.4g}" if not np.isnan(c).all() else "-" for c in columns))
    return table


def _score_medians(store: FeatureStore) -> Table:
    """The middle of each score that a forward pass gave."""
    without = "" if store.layers else "; no spectra were measured"
    table = Table("score", "unit", "median", "samples", title=f"median over samples{without}")
    units = {"loss": "nats per token"} | {name: described["unit"] for name, described in store.manifest.scores.items()}
    for name, unit in units.items():
        values = store.to_arrow([name])[name].drop_null().to_numpy()
        table.add_row(name, unit, f"{np.median(values):.4g}" if len(values) else "-", f"{len(values):,}")
    return table


@dataclass(frozen=True, kw_only=True)
class VerifyCommand(Command):
    """Check every file of a feature store: checksums, owner, columns, missing and doubled samples.

    Example: selector verify features/ --repair
    """

    name: ClassVar[str] = "verify"

    store: Annotated[Path, Positional]
    """Directory of the feature store."""
    repair: bool = False
    """Move what is damaged to quarantine/ and score what is missing again."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint when samples are scored again."""

    def run(self) -> int:
        from selector.store import FeatureStore
        from selector.store.verify import inspect, repair

        manifest, damages = inspect(self.store)
        if manifest is None and not (self.store / CONFIG).is_file():
            raise StoreError(
                f"no feature store at {self.store}",
                got="neither a manifest nor settings",
                fix="make one with `selector score`",
            )
        for damage in damages:
            print(f"error: {damage.error}", file=sys.stderr)
        if damages and self.repair:
            repair(self.store, damages, manifest)
            code = RunCommand(settings_from=self.store, trust_remote_code=self.trust_remote_code).run()
            manifest, damages = inspect(self.store)
            if code:
                return code
        if not damages:
            store = FeatureStore.open(self.store)
            console().print(f"{store.path}: {len(store):,} samples in {len(store.shard_paths())} shards, all sound")
        return 1 if damages else 0
