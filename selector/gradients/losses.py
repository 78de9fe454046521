"""Loss of each sample, as a function of the log-probabilities that the model gives its sequences.

A batch's loss is the sum over its samples, and a sample's loss is divided by nothing but its own tokens and sequences. Then
a sample's gradient is what it gives alone: a mean over the batch would scale it by the other samples' number, and a mean
over the batch's tokens by their lengths. All losses here need no more of a sequence than four numbers, so that each is a
line of arithmetic over samples and sequences (N x s).

Rollouts are taken as drawn from the model that is scored: the importance ratio is 1 and nothing is clipped, as in the
first step after a generation. Its gradient is the advantage times that of the log-probability; no KL term is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selector.batching import Batch
from selector.config import Normalizer
from selector.registry import Registry
from selector.spectra.linalg import uses_kernels


@dataclass(frozen=True, eq=False)
class Sequences:
    """What a loss is made of; the s sequences of each of N samples."""

    log_probs: Float[Tensor, "N s"]
    """Log-probability of the loss tokens, nats."""
    n_tokens: Int[Tensor, "N s"]
    """How many they are."""
    reference: Float[Tensor, "N s"]
    """Their log-probability under the reference model, nats; NaN where the model is its own reference."""
    advantage: Float[Tensor, "N s"]
    """How much better than its group a rollout was; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which loss, and its constants."""

    name: str = "response"
    """One of `losses`."""
    beta: float = 0.1
    """Of the DPO loss."""
    normalizer: Normalizer = "dapo"
    """Of the policy-gradient loss."""
    max_length: int = 4096
    """Longest sequence, tokens: the constant of the `dr_grpo` normalizer."""


ROWS_AT_ONCE = 1024
"""Tokens whose logits are held in float32 at one time."""

RESPONSE = LossSettings()
"""The loss of instruction tuning."""

Loss = Callable[[Sequences, LossSettings], Float[Tensor, " N"]]
"""Loss of each sample; 0 with a zero gradient for a sample without loss tokens."""

losses: Registry[Loss] = Registry("loss")


@losses.register("response")
@losses.register("chosen")
@losses.register("rejected")
def response(sequences: Sequences, settings: LossSettings) -> Float[Tensor, " N"]:
    """Mean cross-entropy of each sample's loss tokens, nats per token.

    Source: the instruction-tuning loss of arXiv 2504.10766, section 3.
    """
    return -sequences.log_probs.sum(1) / sequences.n_tokens.sum(1).clamp(min=1)


@losses.register("dpo")
def dpo(sequences: Sequences, settings: LossSettings) -> Float[Tensor, " N"]:
    """Direct preference optimization of pairs, the chosen sequence first.

    A model that is its own reference stands at the start of training: the loss is log 2, its gradient half of beta times
    that of the difference of the log-probabilities.

    Source: arXiv 2305.18290, equation 7.
    """
    log_probs = sequences.log_probs
    log_ratios = log_probs - torch.where(sequences.reference.isnan(), log_probs.detach(), sequences.reference)
    return -F.logsigmoid(settings.beta * (log_ratios[:, 0] - log_ratios[:, 1]))


@losses.register("policy-gradient")
def policy_gradient(sequences: Sequences, settings: LossSettings) -> Float[Tensor, " N"]:
    """Advantage-weighted likelihood of the rollouts of each group.

    The value is that of the surrogate with ratio 1, minus the mean advantage: it says nothing, its gradient does. With
    lengths n, advantages A and log-probabilities l of s rollouts, the gradient is that of

        dapo     −Σ A l / Σ n
        grpo     −Σ (A l / n) / s
        dr_grpo  −Σ A l / (s · max_length)

    Source: arXiv 2402.03300, equation 3; arXiv 2503.14476, equation 8; arXiv 2503.20783, section 3.2.
    """
    n_tokens = sequences.n_tokens
    # a ratio of 1 per token, with the gradient of the log-probability
    ratios = n_tokens + (sequences.log_probs - sequences.log_probs.detach())
    gains = sequences.advantage * ratios
    rollouts = n_tokens.shape[1]
    if settings.normalizer == "grpo":
        return -(gains / n_tokens.clamp(min=1)).sum(1) / rollouts
    if settings.normalizer == "dr_grpo":
        return -gains.sum(1) / (rollouts * settings.max_length)
    return -gains.sum(1) / n_tokens.sum(1).clamp(min=1)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of tokens that hold no float32 copy of the logits, which would be the largest tensor of the pass.

    A model that is nearly sure of a token has a gradient of p − 1 there, and subtracting would leave nothing but the rounding
    of p. So what the other tokens weigh is summed without it: with weights e of the logits less the largest, and r the sum
    of all but the token's own, p − 1 = −r / (e + r) and ln p is ln e − ln(e + r).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "M V"], rows: Int[Tensor, " P"], tokens: Int[Tensor, " P"]
    ) -> Float[Tensor, " P"]:
        exact = torch.promote_types(logits.dtype, torch.float32)
        largest, own, others = (logits.new_empty(len(tokens), dtype=exact) for _ in range(3))
        if uses_kernels(logits):
            from selector.gradients.loss_kernels import weigh

            weigh(logits, rows, tokens, largest, own, others)
        else:
            for piece in _pieces(len(tokens)):
                part, token = logits[rows[piece]].to(exact), tokens[piece, None]
                largest[piece] = part.amax(-1)
                part.sub_(largest[piece, None])
                own[piece] = part.gather(1, token).squeeze(1)
                others[piece] = part.exp_().scatter_(1, token, 0.0).sum(-1)
        ctx.save_for_backward(logits, rows, tokens, largest, own, others)
        return own - (own.exp() - 1.0 + others).log1p()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, tokens, largest, own, others = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        factor = -grads[0] / (own.exp() + others)
        if uses_kernels(logits):
            from selector.gradients.loss_kernels import spread

            spread(logits, rows, tokens, largest, others, factor, gradient)
        else:
            # memory traffic is all that this costs: a piece is copied once and changed in place
            for piece in _pieces(len(tokens)):
                part = logits[rows[piece]].to(largest.dtype)
                part.sub_(largest[piece, None]).exp_().scatter_(1, tokens[piece, None], -others[piece, None])
                gradient[rows[piece]] = part.mul_(factor[piece, None]).to(gradient.dtype)
        return gradient, None, None


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE))


def token_log_probs(
    logits: Float[Tensor, "R K V"], batch: Batch, columns: Int[Tensor, " K"] | None = None
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """Log-probability of each loss token, sequence after sequence, nats, in float32 or better; and its sequence.

    Args:
        logits: next-token scores; position t predicts token t + 1.
        batch: the samples that gave them; every token of the loss mask is predicted.
        columns: positions that the logits are of; all of the batch's when None.
    """
    if columns is None:
        columns = torch.arange(batch.input_ids.shape[1] - 1, device=logits.device)
    sequence, place = batch.loss_mask[:, columns + 1].nonzero(as_tuple=True)
    column = columns[place] + 1
    rows = sequence * logits.shape[1] + place
    log_probs = _TokenLogProbs.apply(logits.flatten(0, 1), rows, batch.input_ids[sequence, column])
    return log_probs, batch.sequence_of_token[sequence, column]


def sequence_log_probs(
    logits: Float[Tensor, "R K V"], batch: Batch, columns: Int[Tensor, " K"] | None = None
) -> Float[Tensor, " S"]:
    """Log-probability of the loss tokens of each sequence, nats, in float32 or better.

    Args:
        logits: as for `token_log_probs`.
        batch: the samples that gave them.
        columns: as for `token_log_probs`.
    """
    return _per_sequence(*token_log_probs(logits, batch, columns), batch)


def _per_sequence(log_probs: Float[Tensor, " P"], owners: Int[Tensor, " P"], batch: Batch) -> Float[Tensor, " S"]:
    return log_probs.new_zeros(len(batch.reference)).index_add(0, owners, log_probs)


def predicting_columns(batch: Batch) -> Int[Tensor, " K"]:
    """Positions of a batch at which some sequence predicts a loss token; the others need no logits.

    Args:
        batch: any samples.
    """
    return batch.loss_mask[:, 1:].any(0).nonzero().squeeze(1)


def sample_losses(
    logits: Float[Tensor, "R K V"],
    batch: Batch,
    settings: LossSettings = RESPONSE,
    columns: Int[Tensor, " K"] | None = None,
) -> Float[Tensor, " N"]:
    """Loss of each sample of a batch.

    Args:
        logits: next-token scores; position t predicts token t + 1.
        batch: the samples that gave them.
        settings: which loss.
        columns: positions that the logits are of; all of the batch's when None.

    Returns:
        In float32 or better; the gradient of the sum is, for each sample, what the sample gives alone.
    """
    log_probs, owners = token_log_probs(logits, batch, columns)
    n_tokens = owners.new_zeros(len(batch.reference)).index_add(0, owners, torch.ones_like(owners))
    values = (_per_sequence(log_probs, owners, batch), n_tokens, batch.reference, batch.advantage)
    sequences = Sequences(*(value.reshape(len(batch.samples), -1) for value in values))
    return losses[settings.name](sequences, settings)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for the time of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reference_log_probs(model: nn.Module, batch: Batch) -> Float[Tensor, " S"]:
    """Log-probability of the loss tokens of each sequence under a reference model, nats.

    Args:
        model: a causal language model, left as it is.
        batch: any samples.
    """
    with torch.no_grad(), _evaluating(model):
        logits = model(**batch.inputs, use_cache=False).logits
        return sequence_log_probs(logits, batch)
