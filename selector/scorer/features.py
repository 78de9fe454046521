"""One batch of samples in, one row of features per sample out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from selector.batching import Batch
from selector.config import Precision
from selector.data.samples import Sample
from selector.gradients.capture import GradientCapture, LayerFactors, gradients_of_activations_only
from selector.gradients.experts import ExpertRows
from selector.gradients.losses import response_loss
from selector.gradients.targets import Target
from selector.spectra import Core, measures, reduce_factors, solve
from selector.types import MEASURES


class FeatureExtractor:
    """Runs a model on batches and measures the spectra of every sample's gradients.

    Use it inside `with extractor.attached():`, which hooks the model and restores it.

    Args:
        model: a causal language model on its device.
        targets: the layer table.
        precision: how exactly spectra are computed.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], precision: Precision) -> None:
        self.model, self.targets, self.precision = model, targets, precision
        self._position = {target.spec.key: i for i, target in enumerate(targets)}
        self._cores: list[tuple[int, Core, ExpertRows | None]] = []
        self._capture = GradientCapture(model, targets, self._take)

    @contextmanager
    def attached(self) -> Iterator[FeatureExtractor]:
        """Hook the model for the time of the block."""
        with gradients_of_activations_only(self.model), self._capture:
            yield self

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """Measure one batch.

        Args:
            batch: samples of status `ok`.

        Returns:
            The row of the feature store of each sample.
        """
        self._cores = []
        self._capture.begin(samples=len(batch.samples))
        with torch.enable_grad():
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            losses = response_loss(logits, batch)
            losses.sum().backward()
        self._capture.finish()
        features, measured = self._features(len(batch.samples))
        rows = []
        for i, loss in enumerate(losses.detach().tolist()):
            norms = features["frobenius_norm"][i]
            if not (np.isfinite(loss) and np.isfinite(norms[measured[i]]).all()):
                status = "nonfinite"
            else:
                status = "ok" if norms[measured[i]].any() else "zero_gradient"
            rows.append(sample_row(batch.samples[i], status, loss, {name: features[name][i] for name in MEASURES}))
        return rows

    def _take(self, factors: LayerFactors) -> None:
        cores = reduce_factors(factors.x, factors.deltas, precision=self.precision)
        self._cores += [(self._position[spec.key], core, factors.experts) for spec, core in zip(factors.specs, cores, strict=True)]

    def _features(self, n_samples: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Each measure as float32 [N, F], NaN where a layer got no gradient, and where it got one as bool [N, F].

        Routed experts of a layer have the mean over the experts that a sample hits, weighted by its tokens there.
        """
        every = torch.arange(n_samples)
        rows = [(i, every if e is None else e.sample.cpu(), 1.0 if e is None else e.share.cpu()) for i, _, e in self._cores]
        spectra = solve([core for _, core, _ in self._cores])
        measured = torch.zeros(len(self.targets), n_samples, dtype=torch.bool)
        for position, samples, _ in rows:
            measured[position, samples] = True
        features = {}
        for name in MEASURES:
            columns = torch.zeros(len(self.targets), n_samples, dtype=torch.float64)
            for (position, samples, share), spectrum in zip(rows, spectra, strict=True):
                columns[position].index_add_(0, samples, measures[name](spectrum).double().cpu() * share)
            features[name] = columns.masked_fill(~measured, float("nan")).T.float().numpy()
        self._cores = []
        return features, measured.T.numpy()


def sample_row(
    sample: Sample, status: str, loss: float | None = None, features: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """The row of the feature store for one sample; without loss and features unless its status is `ok`.

    Args:
        sample: what was scored.
        status: what became of it.
        loss: nats per token.
        features: float32 [F] for each measure.
    """
    scored = status == "ok" and features is not None
    return {
        "sample_id": sample.sample_id,
        "row": sample.row,
        "source": sample.source,
        "n_tokens": sample.n_tokens,
        "n_loss_tokens": sample.n_loss_tokens,
        "truncated": sample.truncated,
        "status": status,
        "loss": loss if scored else None,
        **{name: features[name] if scored else None for name in MEASURES},
    }
