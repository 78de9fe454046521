"""Loss of each sample, as a function of the model's logits.

A sample's loss is a mean over its own tokens and a batch's loss the sum over its samples. Then a sample's gradient is
what it gives alone: a mean over the batch would scale it by the other samples' number, and a mean over the batch's
tokens by their lengths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selector.batching import Batch


def response_loss(logits: Float[Tensor, "S T V"], batch: Batch) -> Float[Tensor, " N"]:
    """Mean cross-entropy of each sample's response tokens, nats per token.

    Args:
        logits: next-token scores; position t predicts token t + 1.
        batch: the samples that gave them; every token of the loss mask is predicted.

    Returns:
        float32 loss of each sample; 0 with a zero gradient for a sample without loss tokens.

    Source: the instruction-tuning loss of arXiv 2504.10766, section 3.
    """
    predicted = batch.loss_mask[:, 1:]
    targets = batch.input_ids[:, 1:]
    # logits of prompt and padding tokens are left out before the float32 copy, which is the largest tensor of the pass
    token_losses = F.cross_entropy(logits[:, :-1][predicted].float(), targets[predicted], reduction="none")
    sample_of_token = torch.arange(len(batch.samples), device=logits.device).repeat_interleave(batch.sequences_per_sample)
    sample_of_token = sample_of_token[:, None].expand_as(predicted)[predicted]
    totals = torch.zeros(len(batch.samples), device=logits.device).index_add(0, sample_of_token, token_losses)
    counts = predicted.reshape(len(batch.samples), -1).sum(1)
    return totals / counts.clamp(min=1)
