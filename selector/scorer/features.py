"""One batch of samples in, one row of features per sample out."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selector.batching import Batch
from selector.config import Precision
from selector.data.samples import Sample
from selector.errors import ModelError
from selector.forward import ForwardScores, Scorer
from selector.gradients.capture import GradientCapture, LayerFactors, gradients_of_activations_only
from selector.gradients.experts import ExpertRows
from selector.gradients.losses import RESPONSE, LossSettings, predicting_columns, reference_log_probs, sample_losses
from selector.gradients.targets import Target
from selector.scorer.backends import fused_norms, without_plans
from selector.scorer.clocks import BACKWARD, FACTORS, FORWARD, SCORES, SPECTRA, Clocks
from selector.scorer.sharding import without_engine
from selector.spectra import Core, SketchConfig, begin_reduction, measures, sketch, solve
from selector.store.schema import EXPERTS_HIT
from selector.types import MEASURES, LayerSpec

WAITING, WAITING_BYTES = 4, 1 << 30
"""Reductions whose numbers are still on their way, and bytes of factors that they hold: one decoder layer, which keeps a GPU busy meanwhile."""


@dataclass(frozen=True, eq=False)
class _Reduction:
    """Factors whose reduction was launched."""

    specs: tuple[LayerSpec, ...]
    experts: ExpertRows | None
    size: int
    """Bytes that it holds."""
    finish: Callable[[], list[Core]]


class FeatureExtractor:
    """Runs a model on batches and measures the spectra of every sample's gradients, and what forward passes give.

    Without a layer table no backward pass is run.

    Use it inside `with extractor.attached():`, which hooks the model and restores it.

    Args:
        model: a causal language model on its device, or the engine that runs it.
        targets: the layer table; empty where no spectra are wanted.
        precision: how exactly spectra are computed.
        sketch: how gradients are sketched; not at all when None.
        loss: which loss the samples have.
        reference: the DPO loss's reference model, where the data set has no log-probabilities of one; the model itself
            when None.
        checkpoint: recompute each decoder layer in the backward pass instead of keeping its activations.
        scorers: what else to compute, by name.
        bos_token_id: the tokenizer's begin-of-text token; None where it has none.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], precision: Precision, sketch: SketchConfig | None = None,
        loss: LossSettings = RESPONSE, reference: nn.Module | None = None, checkpoint: bool = False,
        scorers: Mapping[str, Scorer] | None = None, bos_token_id: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.targets, self.sketch = without_engine(model), targets, sketch
        self._run = model
        self.precision: Precision = precision
        self.loss, self.reference = loss, reference
        self.clocks = Clocks()
        self._position = {target.spec.key: i for i, target in enumerate(targets)}
        self._routed = [i for i, target in enumerate(targets) if target.spec.is_routed]
        self._begin()
        self._capture = GradientCapture(self.model, targets, self._take, checkpoint=checkpoint and bool(targets))
        self.scores = ForwardScores(self.model, scorers or {}, bos_token_id)
        """What is computed beside spectra."""
        whole: nn.Module = getattr(self.model, "get_base_model", lambda: self.model)()
        self._keeps_logits = "logits_to_keep" in inspect.signature(whole.forward).parameters

    @contextmanager
    def attached(self) -> Iterator[FeatureExtractor]:
        """Hook the model for the time of the block."""
        with (
            without_plans(),
            fused_norms(self.model),
            gradients_of_activations_only(self.model),
            self._capture,
            self.scores.attached(),
        ):
            yield self

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:
        """Measure one batch.

        Args:
            batch: samples of status `ok`.

        Returns:
            The row of the feature store of each sample.
        """
        losses, scores = self._run_model(batch)
        device = batch.input_ids.device
        with self.clocks(SPECTRA, device):
            features, measured, hits = self._features(len(batch.samples), device)
            sketches = self._joined_sketches(len(batch.samples))
        loss = losses.cpu().numpy()
        norms = np.where(measured, features["frobenius_norm"], 0.0)
        finite = np.isfinite(loss) & np.isfinite(norms).all(1)
        for values in scores.values():
            finite &= ~np.isinf(values)  # NaN stands for a number that a sample does not have
        kinds = np.where(
            finite, np.where(norms.any(1) | (not self.targets), "ok", "zero_gradient"), "nonfinite"
        ).tolist()
        arrays = features | hits | sketches if self.targets else {}
        rows = []
        for i, (sample, status, nats) in enumerate(zip(batch.samples, kinds, loss.tolist(), strict=True)):
            given = {name: None if math.isnan(values[i]) else values[i] for name, values in scores.items()}
            rows.append(sample_row(sample, status, nats, {name: matrix[i] for name, matrix in arrays.items()} | given))
        return rows

    def peak_memory(self, batch: Batch) -> int:
        """Most bytes on a GPU that the model's passes over a batch take; the solver's work space adapts to what they leave.

        Args:
            batch: samples of status `ok`, on the GPU.
        """
        torch.cuda.reset_peak_memory_stats(batch.input_ids.device)
        self._run_model(batch)
        self._begin()
        return torch.cuda.max_memory_allocated(batch.input_ids.device)

    def _run_model(self, batch: Batch) -> tuple[Tensor, dict[str, list[float]]]:
        """Passes of the model, which leave cores and sketches behind: losses of the samples, nats per token, and what scorers give."""
        self._begin()
        self._capture.begin(samples=len(batch.samples), segments=batch.segments)
        if self.reference is not None:
            batch = dataclasses.replace(batch, reference=reference_log_probs(self.reference, batch))
        device = batch.input_ids.device
        with torch.set_grad_enabled(bool(self.targets)):
            with self.clocks(FORWARD, device):
                logits, columns = self._logits(batch, whole="logits" in self.scores.needs)
                losses = sample_losses(logits, batch, self.loss, columns)
            self.clocks.settle()
            if self.targets:
                with self.clocks(BACKWARD, device):
                    losses.sum().backward()
                    self._capture.finish()
                    self._finish_reductions(0)
        with self.clocks(SCORES, device):
            scores = {name: v.tolist() for name, v in self.scores(batch, logits, columns, self._logits).items()}
        return losses.detach(), scores

    def _logits(self, batch: Batch, whole: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits of the positions that predict loss tokens, and these, where the model can leave the others out and may."""
        if whole or not self._keeps_logits:
            return self._run(**batch.inputs, use_cache=False).logits, None
        columns = predicting_columns(batch)
        return self._run(**batch.inputs, use_cache=False, logits_to_keep=columns).logits, columns

    def _begin(self) -> None:
        self._reductions: deque[_Reduction] = deque()
        self._cores: list[tuple[int, Core, ExpertRows | None]] = []
        self._sketches: dict[int, Tensor] = {}

    def _take(self, factors: LayerFactors) -> None:
        with self.clocks(FACTORS, factors.x.device):
            self._reduce(factors)

    def _reduce(self, factors: LayerFactors) -> None:
        finish = begin_reduction(factors.x, factors.deltas, precision=self.precision)
        size = sum(tensor.nbytes for tensor in (factors.x, *factors.deltas))
        self._reductions.append(_Reduction(factors.specs, factors.experts, size, finish))
        if self.sketch is not None:
            if factors.experts is not None:
                raise ModelError(
                    "routed experts cannot be sketched", got=factors.specs[0].name, allowed="layers that every token passes",
                    fix="leave them out by --projections q k v o, or set --sketch-dimension 0",
                )  # fmt: skip
            for spec, delta in zip(factors.specs, factors.deltas, strict=True):
                self._sketches[self._position[spec.key]] = sketch(factors.x, delta, spec.key, self.sketch)
        self._finish_reductions(WAITING)

    def _finish_reductions(self, waiting: int) -> None:
        """Take the cores of the oldest reductions, until so many are left that hold no more than they may."""
        held = sum(reduction.size for reduction in self._reductions)
        while len(self._reductions) > waiting or held > WAITING_BYTES:
            reduction = self._reductions.popleft()
            held -= reduction.size
            for spec, core in zip(reduction.specs, reduction.finish(), strict=True):
                self._cores.append((self._position[spec.key], core, reduction.experts))

    def _features(
        self, n_samples: int, device: torch.device
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """Each measure as float32 [N, F], NaN where a layer got no gradient; where it got one as bool [N, F]; experts hit.

        Routed experts of a layer have the mean over the experts that a sample hits, weighted by its tokens there. The
        number of these experts is float32 [N, F], NaN for other layers, under the name of its column; models without have none.
        """
        spectra = solve([core for _, core, _ in self._cores])
        sums = torch.zeros(len(MEASURES), len(self.targets), n_samples, dtype=torch.float64, device=device)
        weights = torch.zeros(len(self.targets), n_samples, dtype=torch.float64, device=device)
        hits = torch.full((len(self.targets), n_samples), float("nan"), device=device)
        hits[self._routed] = 0.0
        # spectra of one shape go through the measures together: hundreds of layers would be thousands of small calls
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for i, spectrum in enumerate(spectra):
            groups[spectrum.shape].append(i)
        for members in groups.values():
            stacked = torch.stack([spectra[i] for i in members])
            values = torch.stack([measures[name](stacked) for name in MEASURES])
            of_samples = [(place, self._cores[i][0]) for place, i in enumerate(members) if self._cores[i][2] is None]
            if of_samples:
                places, positions = torch.tensor(of_samples, device=device).T
                sums[:, positions], weights[positions] = values[:, places], 1.0
            for place, i in enumerate(members):
                position, _, experts = self._cores[i]
                if experts is not None:
                    sums[:, position].index_add_(1, experts.sample, values[:, place] * experts.tokens)
                    weights[position].index_add_(0, experts.sample, experts.tokens.double())
                    hits[position].index_add_(0, experts.sample, torch.ones_like(experts.sample, dtype=hits.dtype))
        self._cores = []
        columns = (sums / weights).transpose(1, 2).float().cpu().numpy()
        counted = {EXPERTS_HIT: hits.T.cpu().numpy()} if self._routed else {}
        return dict(zip(MEASURES, columns, strict=True)), (weights > 0).T.cpu().numpy(), counted

    def _joined_sketches(self, n_samples: int) -> dict[str, np.ndarray]:
        """Sketches as float16 [N, F d], each layer divided by its largest number, and these as float32 [N, F]."""
        if self.sketch is None:
            return {}
        missing = torch.full((n_samples, self.sketch.dimension), float("nan"))
        layers = torch.stack(
            [self._sketches[i].cpu() if i in self._sketches else missing for i in range(len(self.targets))], dim=1
        )
        scale = layers.abs().amax(-1, keepdim=True)
        self._sketches = {}
        joined = (layers / scale.masked_fill(scale == 0, 1.0)).half().flatten(1)
        return {"sketch": joined.numpy(), "sketch_scale": scale.squeeze(-1).numpy()}


def sample_row(
    sample: Sample, status: str, loss: float | None = None, features: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The row of the feature store for one sample; without loss and features unless its status is `ok`.

    Args:
        sample: what was scored.
        status: what became of it.
        loss: nats per token.
        features: float32 [F] for each measure, the sketch where there is one, and a number or None for each scorer.
    """
    given = features if status == "ok" else None
    return {
        "sample_id": sample.sample_id,
        "row": sample.row,
        "source": sample.source,
        "n_tokens": sample.n_tokens,
        "n_loss_tokens": sample.n_loss_tokens,
        "truncated": sample.truncated,
        "status": status,
        "loss": None if given is None else loss,
        **(dict.fromkeys(MEASURES) if given is None else given),
    }
