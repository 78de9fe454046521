"""What a forward pass gives of a batch, and the batch without its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from selector.batching import Batch, collate, join
from selector.data.samples import Sample, TokenSequence
from selector.gradients.losses import token_log_probs
from selector.gradients.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One forward pass of a batch: R rows of at most T tokens, of N samples with S sequences in all."""

    batch: Batch
    logits: Float[Tensor, "R K V"]
    """Next-token scores in the model's number format; position t predicts token t + 1."""
    columns: Int[Tensor, " K"] | None = None
    """Positions that the logits are of, among them each that predicts a loss token; all of the batch's when None."""
    hidden: Float[Tensor, "R T H"] | None = None
    """What the output head reads: hidden states after the last layer and the final norm; for scorers that need `hidden`."""
    alone: ForwardPass | None = None
    """The same pass of `responses_alone`; for scorers that need `alone`."""

    def rows(self, values: Float[Tensor, "R T C"]) -> Float[Tensor, "N L C"]:
        """One row of tokens per sample, its sequences one behind the other, zeros where there is no token.

        Args:
            values: one vector per token of the batch.
        """
        padding = self.batch.attention_mask == 0
        return self._tokens.split(values.masked_fill(padding[..., None], 0))

    @cached_property
    def _tokens(self) -> TokenMap:
        return TokenMap(len(self.batch.samples), self.batch.segments)

    @cached_property
    def token_log_probs(self) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
        """Log-probability of each loss token, sequence after sequence, nats; and its sequence."""
        return token_log_probs(self.logits, self.batch, self.columns)


def responses_alone(batch: Batch, bos_token_id: int | None) -> Batch:
    """The same samples with nothing but the tokens that carry loss, as if no prompt had been there.

    A begin-of-text token at the start of a sequence stays, so that every response token is still predicted; without one the
    first response token only begins the text.

    Args:
        batch: any samples.
        bos_token_id: the tokenizer's begin-of-text token; None where it has none.
    """
    samples = [
        replace(sample, sequences=tuple(_alone(sequence, bos_token_id) for sequence in sample.sequences))
        for sample in batch.samples
    ]
    return _like(batch, samples)


def _alone(sequence: TokenSequence, bos_token_id: int | None) -> TokenSequence:
    kept = sequence.loss_mask.copy()
    # a rollout that carries no loss keeps a token too: no model reads an empty sequence
    kept[0] = sequence.input_ids[0] == bos_token_id or not kept.any()
    loss_mask = np.ones(int(kept.sum()), dtype=bool)
    loss_mask[0] = False
    return TokenSequence(sequence.input_ids[kept], loss_mask)


def _like(batch: Batch, samples: Sequence[Sample]) -> Batch:
    """Samples in a batch of the same kind, padded or joined."""
    device = batch.input_ids.device
    return join(samples, device) if batch.segments else collate(samples, pad_token_id=0, device=device)
