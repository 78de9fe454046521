"""Reference scorers: what others select by, from forward passes alone, to hold gradient spectra against.

A scorer turns a pass of a batch into one number per sample. A sample's tokens are those of all its sequences taken together,
as for gradients. Numbers are NaN where a sample has no such score, and infinite where its logits or hidden states are not
finite, which makes the sample's status `nonfinite`. As with every score, batch mates, padding and order must not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selector.errors import ConfigError, SelectorError, did_you_mean, raise_all
from selector.forward.passes import ForwardPass
from selector.registry import Registry
from selector.spectra import Measure, effective_rank, nuclear_norm
from selector.spectra.linalg import outer_square, root_eigenvalues

Need = Literal["alone", "hidden", "logits"]

VALUES_AT_ONCE = 1 << 24
"""Logits that are held in float64 at one time."""
KERNEL_MULTIPLE = 64
"""Sizes of matrices that the eigenvalue kernels take."""

ALWAYS = ("spectra", "loss")
"""What can be asked for beside the registered scorers: gradients, and the loss, which every pass gives."""


@dataclass(frozen=True)
class Scorer:
    """What has to be known of a score that forward passes give."""

    compute: Callable[[ForwardPass], Float[Tensor, " N"]]
    """One number per sample; NaN for none, infinite for one that is not finite."""
    higher_first: bool
    """Whether those who propose the score take its high end."""
    unit: str
    """Of the number, for tables."""
    needs: tuple[Need, ...] = ()
    """What the pass must hold beside the logits that predict loss tokens: `alone` costs a second forward pass, of the
    responses; `hidden` the last hidden states; `logits` those of every position, which are the largest tensor of a pass."""


scorers: Registry[Scorer] = Registry("scorer")
"""Scorers by name, which is also the name of their column in a store."""


def named_scorers(names: Iterable[str]) -> dict[str, Scorer]:
    """The registered scorers among the names that a run asks for, in alphabetical order.

    Args:
        names: of scorers, and any of `ALWAYS`.

    Raises:
        ConfigError: unknown names; all of them at once.
    """
    known = [*ALWAYS, *scorers]
    wanted = sorted(set(names))
    problems: list[SelectorError] = [
        ConfigError("unknown scorer", got=repr(name), allowed=", ".join(known), fix=did_you_mean(name, known) or None)
        for name in wanted
        if name not in known
    ]
    raise_all(problems)
    return {name: scorers[name] for name in wanted if name not in ALWAYS}


def ifd(forward: ForwardPass) -> Float[Tensor, " N"]:
    """Instruction-following difficulty: mean loss of the response after its prompt over its mean loss without it.

    Above 1 the prompt makes the response less likely. Both means are over the tokens that both passes predict: all response
    tokens where texts begin with a begin-of-text token, else all but the first of each sequence.

    Args:
        forward: with `alone`.

    Returns:
        A ratio of mean losses, not of perplexities; NaN where no token is predicted in both passes.

    Source:
        arXiv 2308.12032, equations 3 to 5.
    """
    assert forward.alone is not None
    log_probs, owners = forward.token_log_probs
    direct, predicted = forward.alone.token_log_probs
    sequences = len(forward.batch.reference)
    shorter = owners.bincount(minlength=sequences) > predicted.bincount(minlength=sequences)
    first = owners.diff(prepend=owners.new_tensor([-1])) != 0
    both = ~(first & shorter[owners])
    each = sequences // len(forward.batch.samples)
    sums = torch.zeros(2, len(forward.batch.samples), dtype=torch.float64, device=owners.device)
    sums[0].index_add_(0, owners[both] // each, log_probs[both].double())
    sums[1].index_add_(0, predicted // each, direct.double())
    return (sums[0] / sums[1]).masked_fill(sums[1] == 0, torch.nan)


def hidden_effective_rank(forward: ForwardPass) -> Float[Tensor, " N"]:
    """Effective rank of the matrix of a sample's last hidden states, prompt and response, one row per token, not centred.

    Args:
        forward: with `hidden`.

    Returns:
        A count between 1 and the number of tokens.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", applied to hidden states.
    """
    assert forward.hidden is not None
    rows = forward.rows(forward.hidden).double()
    gram = outer_square(rows if rows.shape[1] <= rows.shape[2] else rows.mT)
    return _measured(forward, gram, effective_rank)


def angle_concentration(forward: ForwardPass) -> Float[Tensor, " N"]:
    """Mean cosine among the last hidden states of the response, plus the mean cosine between response and prompt.

    With unit vectors u, both means come from two sums of vectors: mean u_i·u_j = ‖mean u‖². Tokens that carry loss are the
    segment that is learned, all others its context.

    Args:
        forward: with `hidden`.

    Returns:
        A sum of two cosines, -1 to 2.

    Source:
        The sum of an intra- and an inter-segment angle concentration is that of arXiv 2506.02281 (GAIN-RL), which takes the
        question as segment and the system prompt as context. Which segments are meant here and that each term is a mean over all
        pairs is this library's reading: the published script cuts one template at fixed offsets and weights the second term by 8.
    """
    assert forward.hidden is not None
    units = forward.rows(F.normalize(forward.hidden.float(), dim=-1)).double()
    learned = forward.batch.loss_mask
    means = []
    for tokens in (learned, ~learned & (forward.batch.attention_mask == 1)):
        weights = forward.rows(tokens[..., None].double()).mT
        means.append((weights @ units / weights.sum(-1, keepdim=True)).squeeze(1))
    segment, context = means
    values = (segment * (segment + context)).sum(-1)
    return values.masked_fill(values.isnan(), torch.inf)  # the first token is never learned: no sample lacks a segment


def logit_nuclear_norm(forward: ForwardPass) -> Float[Tensor, " N"]:
    """Nuclear norm of the matrix of a sample's logits, prompt and response, one row per token and one column per word.

    Singular values come from a Gram matrix of the smaller side, summed in float64 over blocks of the vocabulary: beside the
    logits that the model gives, in its own number format, no second copy is held.

    Args:
        forward: with `logits`.

    Returns:
        The norm, in the unit of the logits.

    Source:
        arXiv 2510.16882 (UDS), intra-sample importance score; there padding of the batch counts as tokens, here it does not.
    """
    positions, vocabulary = forward.logits.shape[:-1].numel(), forward.logits.shape[-1]
    length = forward.rows(forward.logits[..., :1]).shape[1]
    if vocabulary <= length:
        rows = forward.rows(forward.logits.double())
        return _measured(forward, rows.mT @ rows, nuclear_norm)
    gram = forward.logits.new_zeros(len(forward.batch.samples), length, length, dtype=torch.float64)
    for part in forward.logits.split(max(VALUES_AT_ONCE // positions, 1), dim=-1):
        rows = forward.rows(part.double())
        gram.baddbmm_(rows, rows.mT)
    return _measured(forward, gram, nuclear_norm)


def _measured(forward: ForwardPass, gram: Float[Tensor, "N n n"], measure: Measure) -> Float[Tensor, " N"]:
    """A measure of the singular values of one matrix per sample, from Gram matrices; infinite where these are not finite."""
    bad = ~gram.isfinite().flatten(1).all(1)
    gram = gram.masked_fill(bad[:, None, None], 0.0)
    missing = -gram.shape[-1] % KERNEL_MULTIPLE if gram.is_cuda else 0
    sigma = root_eigenvalues(F.pad(gram, (0, missing, 0, missing)))
    # rows of padding leave rounding where there is no singular value
    tokens = torch.tensor([sample.n_tokens for sample in forward.batch.samples], device=sigma.device)
    beyond = torch.arange(sigma.shape[-1], device=sigma.device) >= tokens[:, None]
    return measure(sigma.masked_fill(beyond, 0.0)).masked_fill(bad, torch.inf)


scorers.register("ifd")(Scorer(ifd, higher_first=True, unit="ratio", needs=("alone",)))
scorers.register("hidden_effective_rank")(
    Scorer(hidden_effective_rank, higher_first=True, unit="count", needs=("hidden",))
)
scorers.register("angle_concentration")(
    Scorer(angle_concentration, higher_first=True, unit="cosine", needs=("hidden",))
)
scorers.register("logit_nuclear_norm")(Scorer(logit_nuclear_norm, higher_first=True, unit="logits", needs=("logits",)))
