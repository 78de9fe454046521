"""Give scorers what they need from a model: last hidden states, and a second pass of the responses alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selector.batching import Batch
from selector.errors import ModelError
from selector.forward.passes import ForwardPass, responses_alone
from selector.forward.scorers import Scorer

Run = Callable[[Batch], tuple[Float[Tensor, "R K V"], Int[Tensor, " K"] | None]]
"""Logits of a batch, and the positions that they are of, as `ForwardPass` holds them."""


class ForwardScores:
    """The scores of batches that a set of scorers gives.

    Use it inside `with scores.attached():`, which hooks the model where last hidden states are needed and restores it.

    Args:
        model: a causal language model in evaluation mode.
        scorers: by name.
        bos_token_id: the tokenizer's begin-of-text token; None where it has none.

    Raises:
        ModelError: a scorer needs hidden states that the model does not show.
    """

    def __init__(self, model: nn.Module, scorers: Mapping[str, Scorer], bos_token_id: int | None = None) -> None:
        self.scorers, self.bos_token_id = dict(scorers), bos_token_id
        self.needs = frozenset(need for scorer in scorers.values() for need in scorer.needs)
        self._hidden: Tensor | None = None
        whole: nn.Module = getattr(model, "get_base_model", lambda: model)()
        # base_model would not do: OPT's output head reads the decoder inside it
        self._body = getattr(whole, "get_decoder", lambda: whole)()
        self._name = type(whole).__name__
        if self._body is whole:
            self._check_hidden()

    @contextmanager
    def attached(self) -> Iterator[ForwardScores]:
        """Watch the model for the time of the block."""
        handle = self._body.register_forward_hook(self._keep) if "hidden" in self.needs else None
        try:
            # a compiled graph leaves out hooks that came after it
            with torch.compiler.set_stance("force_eager"):
                yield self
        finally:
            self._hidden = None
            if handle is not None:
                handle.remove()

    @torch.no_grad()
    def __call__(
        self, batch: Batch, logits: Float[Tensor, "R K V"], columns: Int[Tensor, " K"] | None, run: Run
    ) -> dict[str, Float[Tensor, " N"]]:
        """Scores of the batch that the model has read last.

        Args:
            batch: its samples.
            logits: what the model gave; of every position where a scorer needs `logits`.
            columns: positions that the logits are of; all when None.
            run: makes the second pass.

        Returns:
            For each scorer one float64 per sample.
        """
        if not self.scorers:
            return {}
        if self._hidden is None:
            self._check_hidden()
        hidden, self._hidden = self._hidden, None
        alone = None
        if "alone" in self.needs:
            without = responses_alone(batch, self.bos_token_id)
            alone = ForwardPass(without, *run(without))
            self._hidden = None
        forward = ForwardPass(batch, logits.detach(), columns, hidden, alone)
        return {name: scorer.compute(forward).double() for name, scorer in self.scorers.items()}

    def _check_hidden(self) -> None:
        """Refuse a model whose last hidden states cannot be seen, where a scorer needs them."""
        if "hidden" in self.needs:
            raise ModelError(
                "last hidden states cannot be read", got=self._name, allowed="models of transformers, whose output head is apart",
                fix="leave out " + ", ".join(name for name, scorer in self.scorers.items() if "hidden" in scorer.needs),
            )  # fmt: skip

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        self._hidden = (output[0] if states is None else states).detach()
