"""Which tokens make a sample's gradient: the side table of chosen samples, tokens and whole spectra.

The gradient of a linear layer is the sum over tokens of δ_t x_tᵀ, so ‖x_t‖ ‖δ_t‖ is the size of what token t gives to it.
Parts of different tokens can cancel: sizes say where a gradient comes from, not how much would be left without a token.
Over layers and projections the root mean square is taken. Each sample is run by itself, so this is for tens of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor, nn

from selector.batching import collate
from selector.config import ScoreConfig
from selector.data.samples import Sample
from selector.errors import ConfigError, DataError, ModelError, SelectorError, raise_all
from selector.gradients.capture import GradientCapture, LayerFactors, gradients_of_activations_only
from selector.gradients.losses import reference_log_probs, sample_losses
from selector.scorer.plan import Plan, plan
from selector.scorer.sharding import is_sharded
from selector.spectra import reduce_factors, solve
from selector.store.explanations import SCHEMA, add_explanations
from selector.store.writer import check

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

NAMES_SHOWN = 5


def explain(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: datasets.Dataset, store: str | Path, ids: Sequence[str],
    config: ScoreConfig | None = None, reference: nn.Module | None = None,
) -> pa.Table:  # fmt: skip
    """Add samples to a store's side table of token contributions and whole spectra.

    Args:
        model: the model that the store was made with, whole on one device; put back as it was.
        tokenizer: its tokenizer.
        dataset: the data set that was scored.
        store: the store's directory.
        ids: sample ids.
        config: settings of the store; the defaults when None.
        reference: as for `score_dataset`.

    Returns:
        The rows that were added, in the columns of `selector.store.explanations`.

    Raises:
        ConfigError: the settings measure no gradients.
        DataError: an id names no sample, or one that has no gradient.
        ModelError: the model is sharded.
        StoreError: model, data or settings are not those of the store.
    """
    config, store = config or ScoreConfig(), Path(store)
    if is_sharded(model):
        raise ModelError(
            "a sharded model cannot explain samples",
            allowed="a model whole on one device",
            fix="repeat the command without FSDP or DeepSpeed",
        )
    check_explainable(config)
    work = plan(model, tokenizer, dataset, config, reference)
    manifest = check(store, work.manifest, work.rows, append=True)
    samples = _asked(work.samples, ids)
    rows = []
    explainer = _Explainer(model, work, reference)
    with gradients_of_activations_only(model), explainer.capture:
        for sample in samples:
            contribution, spectra = explainer(
                sample, tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
            )
            tokens = [
                text for sequence in sample.sequences for text in token_texts(tokenizer, sequence.input_ids.tolist())
            ]
            predicted = [bool(p) for sequence in sample.sequences for p in sequence.loss_mask]
            rows.append(
                {
                    "sample_id": sample.sample_id,
                    "tokens": tokens,
                    "loss_mask": predicted,
                    "contribution": contribution,
                    "spectra": spectra,
                }
            )
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    add_explanations(store, manifest.fingerprint, table)
    return table


def check_explainable(config: ScoreConfig) -> None:
    """Make sure that a run measures what samples are explained by.

    Args:
        config: settings of the run.

    Raises:
        ConfigError: no spectra are asked for.
    """
    if "spectra" not in config.scorers:
        raise ConfigError(
            "samples are explained by their gradients, which are not measured", got=", ".join(config.scorers),
            allowed="spectra among the scorers", fix="add spectra to --with",
        )  # fmt: skip


def _asked(samples: Sequence[Sample], ids: Sequence[str]) -> list[Sample]:
    known = {sample.sample_id: sample for sample in samples}
    missing = [sample_id for sample_id in ids if sample_id not in known]
    without = [sample_id for sample_id in ids if sample_id in known and known[sample_id].status != "ok"]
    problems: list[SelectorError] = []
    if missing:
        problems.append(
            DataError(
                f"{len(missing)} ids name no sample",
                got=", ".join(missing[:NAMES_SHOWN]),
                fix="take ids from `selector report` or `selector search`",
            )
        )
    if without:
        problems.append(
            DataError(
                f"{len(without)} samples have no gradient",
                got=", ".join(without[:NAMES_SHOWN]),
                allowed="samples of status ok",
                fix="leave them out",
            )
        )
    raise_all(problems)
    return [known[sample_id] for sample_id in dict.fromkeys(ids)]


class _Explainer:
    """Runs single samples and keeps what the hooks see of them."""

    def __init__(self, model: nn.Module, work: Plan, reference: nn.Module | None) -> None:
        self.model, self.work, self.reference = model, work, reference
        self.capture = GradientCapture(model, work.targets, self._take)
        self._position = {target.spec.key: i for i, target in enumerate(work.targets)}

    def __call__(self, sample: Sample, pad_token_id: int) -> tuple[list[float], list[list[float] | None]]:
        """Contribution of each token, and the spectrum of each entry of the layer table."""
        batch = collate([sample], pad_token_id, next(self.model.parameters()).device)
        if self.reference is not None:
            batch.reference.copy_(reference_log_probs(self.reference, batch))
        present = batch.attention_mask.flatten().bool()
        self._squares = torch.zeros(len(present), dtype=torch.float64, device=present.device)
        self._matrices = 0
        self._spectra: list[list[float] | None] = [None] * len(self.work.targets)
        self.capture.begin(samples=1)
        with torch.enable_grad():
            logits = self.model(**batch.inputs, use_cache=False).logits
            sample_losses(logits, batch, self.work.loss).sum().backward()
        self.capture.finish()
        contribution = (self._squares[present] / max(self._matrices, 1)).sqrt()
        return contribution.tolist(), self._spectra

    def _take(self, factors: LayerFactors) -> None:
        if factors.experts is not None or factors.x.shape[1] != len(self._squares):
            return  # rows that are not the sample's tokens: those of routed experts, and of an adapter's own matrices
        inputs = _row_squares(factors.x)
        cores = reduce_factors(factors.x, factors.deltas, "high")
        for spec, delta, core, sigma in zip(factors.specs, factors.deltas, cores, solve(cores), strict=True):
            self._squares += inputs * _row_squares(delta)
            self._matrices += 1
            self._spectra[self._position[spec.key]] = sigma[0][sigma[0] > core.floor[0]].tolist()


def _row_squares(rows: Tensor) -> Tensor:
    return rows[0].double().square().sum(-1)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; together they are the text that all tokens decode to.

    A character of several tokens comes with the last of them. Some tokenizers write a token differently at the beginning of a
    text, so each is decoded behind the tokens before it.

    Args:
        tokenizer: any tokenizer.
        ids: token ids of one sequence.
    """
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = (str(tokenizer.decode(ids[start:stop])) for stop in (read, end))
        if now.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts
