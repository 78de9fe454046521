"""Turn rows into samples of tokens, exactly as TRL's trainers prepare the same rows.

A prompt and its completion are tokenized together; the completion starts where the tokens of the prompt alone and of
the whole diverge. Plain completions and texts get the end token; conversations get what their chat template writes.
Rollouts given as text are taken to have ended; only tokens can say that one was cut off, or how it was tokenized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32

from selector.config import LossName, Truncation
from selector.data.drafts import Draft, Encoded, Writer
from selector.data.exchanges import Exchange, exchanges
from selector.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_TOGETHER = 2_000_000
"""Texts are tokenized together until they reach this size; tokens take about ten times the memory before they are packed."""

CANCELLED = 1e-6
"""Sums of advantages below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenSequence:
    """Tokens that the model reads in one go."""

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    """Which tokens are predicted in the loss; never the first, which nothing precedes."""
    reference: float | None = None
    """Log-probability of the predicted tokens under the reference model, nats; None for the model's own."""
    advantage: float | None = None
    """How much better than its group a rollout was; None where no policy-gradient loss is taken."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One row of the data set: the unit that is scored and selected."""

    sample_id: str
    row: int
    source: str | None
    sequences: tuple[TokenSequence, ...]
    """Token sequences whose gradients add; none where the row could not be encoded."""
    truncated: bool = False
    status: str = "ok"
    """`ok`, or why the sample has no spectra: `zero_gradient`, `no_loss_tokens`, `too_long`, or `error: …`."""

    @property
    def n_tokens(self) -> int:
        """Tokens over all sequences."""
        return sum(map(len, self.sequences))

    @property
    def n_loss_tokens(self) -> int:
        """Tokens that carry loss, over all sequences."""
        return sum(int(sequence.loss_mask.sum()) for sequence in self.sequences)


@dataclass(frozen=True)
class Encoder:
    """Rows to token sequences, with one tokenizer, one truncation policy and one loss.

    Args:
        tokenizer: of the model that is going to be trained.
        max_length: longest sequence, tokens.
        truncation: what to do with longer ones.
        loss: what the samples are made for, as `Layout.loss` names it.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: Truncation
    loss: LossName = "response"

    def encode(
        self, rows: Iterable[Mapping[str, Any]], ids: Sequence[str], sources: Sequence[str | None], first: int = 0
    ) -> Iterator[Sample]:
        """Encode row after row.

        Args:
            rows: contents by role, as `Layout.rows` gives them.
            ids: sample id of each row of the data set.
            sources: source of each row of the data set.
            first: position of the first of these rows in the data set.

        Returns:
            One sample per row, in order; a row that cannot be encoded has a status that says why.
        """
        writer = Writer(self.tokenizer, end_empty=self.loss in ("dpo", "policy-gradient"))
        waiting: list[_Row] = []
        characters = 0
        for number, row in enumerate(rows, first):
            entry = _Row(ids[number], number, sources[number])
            try:
                entry.exchanges = exchanges(row, self.loss)
                entry.drafts = [writer.draft(exchange, row) for exchange in entry.exchanges]
            except DataError as error:
                entry.problem = error.problem
            waiting.append(entry)
            characters += sum(draft.size for draft in entry.drafts)
            if characters >= CHARACTERS_TOGETHER:
                yield from self._samples(waiting)
                waiting, characters = [], 0
        yield from self._samples(waiting)

    def _samples(self, waiting: list[_Row]) -> Iterator[Sample]:
        """Tokenize the texts of many rows at once, each different one once."""
        drafts = [draft for entry in waiting if not entry.problem for draft in entry.drafts if isinstance(draft, Draft)]
        tokens = {
            template: self._tokenize(
                dict.fromkeys(text for draft in drafts if draft.template == template for text in draft.texts()),
                template,
            )
            for template in (False, True)
        }
        for entry in waiting:
            if entry.problem:
                yield Sample(entry.sample_id, entry.row, entry.source, (), status=f"error: {entry.problem}")
                continue
            encoded = [
                draft.encode(tokens[draft.template]) if isinstance(draft, Draft) else draft for draft in entry.drafts
            ]
            yield self._sample(entry, encoded)

    def _tokenize(self, texts: Iterable[str], template: bool) -> dict[str, Int32[np.ndarray, " _"]]:
        texts = list(texts)
        if not texts:
            return {}
        encoded = self.tokenizer(texts, add_special_tokens=not template, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return {text: np.array(ids, dtype=np.int32) for text, ids in zip(texts, encoded, strict=True)}  # pyright: ignore[reportArgumentType]

    def _sample(self, entry: _Row, encoded: list[Encoded]) -> Sample:
        """Apply the truncation policy and find samples that have no gradient."""
        if self.loss == "dpo":
            # the sides share their prompt, which ends where the first of them departs from it
            start = min(_first_loss_token(mask) for _, mask in encoded)
            for _, mask in encoded:
                mask[start:] = True
        sequences, statuses = [], []
        truncated = False
        for exchange, (input_ids, mask) in zip(entry.exchanges, encoded, strict=True):
            excess = len(input_ids) - self.max_length
            if excess > 0:
                cut, status = self._cut(mask, excess)
                input_ids, mask = input_ids[cut], mask[cut]
                truncated |= self.truncation.startswith("truncate")
                statuses.append(status)
                if exchange.reference is not None and status == "ok":
                    statuses.append("error: a reference log-probability does not hold for a truncated sequence")
            mask[:1] = False
            sequences.append(TokenSequence(input_ids, mask, exchange.reference, exchange.advantage))
        status = next((status for status in statuses if status != "ok"), None) or self._status_without_pass(sequences)
        return Sample(entry.sample_id, entry.row, entry.source, tuple(sequences), truncated, status)

    def _cut(self, mask: Bool[np.ndarray, " T"], excess: int) -> tuple[slice, str]:
        """Which part of a sequence that is too long to keep, and what that makes of it."""
        if self.truncation == "truncate-prompt":
            return slice(excess, None), "ok" if _first_loss_token(mask) > excess else "too_long"
        if self.truncation == "truncate-completion":
            return slice(self.max_length), "ok"
        return slice(None), "too_long"

    def _status_without_pass(self, sequences: list[TokenSequence]) -> str:
        """Status of a sample whose gradient is known to be missing or zero before any pass of the model."""
        with_loss = [sequence.loss_mask.any() for sequence in sequences]
        enough = all(with_loss) if self.loss == "dpo" else any(with_loss)
        if not enough or not all(map(len, sequences)):  # a sequence without any token cannot be read by a model
            return "no_loss_tokens"
        if self.loss == "policy-gradient" and _cancel(sequences):
            return "zero_gradient"
        if self.loss == "dpo" and np.array_equal(sequences[0].input_ids, sequences[1].input_ids):
            return "zero_gradient"
        return "ok"


@dataclass(eq=False, slots=True)
class _Row:
    """A row that waits for its texts to be tokenized."""

    sample_id: str
    row: int
    source: str | None
    exchanges: list[Exchange] = field(default_factory=list)
    drafts: list[Draft | Encoded] = field(default_factory=list)
    problem: str = ""


def _cancel(rollouts: list[TokenSequence]) -> bool:
    """Whether the gradients of a group's rollouts add up to zero: no advantages, or equal rollouts with opposite ones."""
    totals: defaultdict[bytes, float] = defaultdict(float)
    for rollout in rollouts:
        if rollout.loss_mask.any():
            totals[rollout.input_ids.tobytes() + rollout.loss_mask.tobytes()] += rollout.advantage or 0.0
    largest = max(abs(rollout.advantage or 0.0) for rollout in rollouts)
    return all(abs(total) <= CANCELLED * largest for total in totals.values())


def _first_loss_token(mask: Bool[np.ndarray, " T"]) -> int:
    return int(mask.argmax()) if mask.any() else len(mask)
