"""`selector index`: put the spectra of a store where neighbors can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional

from selector.cli.command import Command, console
from selector.config import save_yaml
from selector.store.schema import CONFIG


@dataclass(frozen=True, kw_only=True)
class IndexCommand(Command):
    """Build a FAISS index over the spectral features of a store.

    Example: selector index features/ --out index/
    """

    name: ClassVar[str] = "index"

    store: Annotated[Path, Positional]
    """Directory of the feature store."""
    out: Path
    """Directory of the index."""
    metric: Literal["cosine", "l2"] = "cosine"
    """How samples are compared."""
    kind: Literal["auto", "flat", "ivf", "ivf-sq8", "ivf-pq"] = "auto"
    """Exact, inverted lists, or compressed ones; auto chooses by size and says so."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """FAISS, or torch matrix products where FAISS does not reach the device."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where searches run."""
    seed: int = 0
    """Of every random choice."""

    def run(self) -> int:
        from selector.index import GradientIndex
        from selector.scores import score
        from selector.store import FeatureStore

        store = FeatureStore.open(self.store)
        index = GradientIndex.build(
            store,
            scores=score(store),
            metric=self.metric,
            kind=self.kind,
            backend=self.backend,
            device=self.device,
            seed=self.seed,
        )
        index.save(self.out)
        save_yaml(self.out / CONFIG, self.settings(), f"replay with: selector run {self.out}")
        console().print(f"{self.out}: {index.description}")
        return 0
