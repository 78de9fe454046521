"""Turn rows into samples of tokens, exactly as TRL's SFT trainer prepares the same rows.

A prompt and its completion are tokenized together; the completion starts where the tokens of the prompt alone and of
the whole diverge. Plain completions and texts get the end token; conversations get what their chat template writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32

from selector.config import Truncation
from selector.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_TOGETHER = 1000


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens that the model reads in one go."""

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    """Which tokens are predicted in the loss; never the first, which nothing precedes."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Sample:
    """One row of the data set: the unit that is scored and selected."""

    sample_id: str
    row: int
    source: str | None
    sequences: tuple[TokenSequence, ...]
    """Token sequences whose gradients add; none where the row could not be encoded."""
    truncated: bool = False
    status: str = "ok"
    """`ok`, or why the sample cannot be scored."""

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
    """Rows to token sequences, with one tokenizer and one truncation policy.

    Args:
        tokenizer: of the model that is going to be trained.
        max_length: longest sequence, tokens.
        truncation: what to do with longer ones.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: Truncation

    def encode(self, rows: Iterable[Mapping[str, Any]], ids: Sequence[str], sources: Sequence[str | None]) -> Iterator[Sample]:
        """Encode row after row.

        Args:
            rows: contents by role, as `Layout.rows` gives them.
            ids: sample id of each row.
            sources: source of each row.

        Raises:
            DataError: the tokenizer has no chat template and the rows are conversations.
        """
        numbered = iter(enumerate(rows))
        while chunk := list(islice(numbered, TOKENIZED_TOGETHER)):
            texts = [_plain_text(row, self.tokenizer.eos_token or "") for _, row in chunk]
            plain = [text for text in texts if text is not None]
            prompts = iter(self._tokenize([prompt for prompt, _ in plain if prompt is not None]))
            wholes = iter(self._tokenize([whole for _, whole in plain]))
            for (row_number, row), text in zip(chunk, texts, strict=True):
                try:
                    if text is None:
                        tokens, mask = self._conversation(row)
                    else:
                        tokens = next(wholes)
                        start = 0 if text[0] is None else common_prefix_length(next(prompts), tokens)
                        mask = [i >= start for i in range(len(tokens))]
                except DataError as error:
                    sample = Sample(ids[row_number], row_number, sources[row_number], (), status=f"error: {error.problem}")
                else:
                    sample = self._fit(ids[row_number], row_number, sources[row_number], tokens, mask)
                yield sample

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []  # pyright: ignore[reportReturnType]

    def _conversation(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation; loss on the completion, or on the assistant's turns."""
        if "prompt" in row:
            prompt, completion = _messages(row["prompt"], "prompt"), _messages(row["completion"], "completion")
            whole = self._render([*prompt, *completion])
            start = common_prefix_length(self._render(prompt, add_generation_prompt=True), whole)
            return whole, [i >= start for i in range(len(whole))]
        if "messages" not in row:
            raise DataError("a row holds " + ", ".join(f"{role} = {type(value).__name__}" for role, value in row.items()) + ", not text")
        messages = _messages(row["messages"], "messages")
        whole = self._render(messages)
        mask = [False] * len(whole)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], add_generation_prompt=True) if turn else []
            until = self._render(messages[: turn + 1])
            if whole[: len(until)] != until:
                raise DataError("the chat template renders a conversation's beginning differently once it goes on")
            start = common_prefix_length(before, whole)
            mask[start : len(until)] = [True] * (len(until) - start)
        return whole, mask

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
        return encoded["input_ids"]  # pyright: ignore[reportReturnType, reportArgumentType, reportCallIssue]

    def _fit(self, sample_id: str, row: int, source: str | None, tokens: list[int], mask: list[bool]) -> Sample:
        """Apply the truncation policy and find samples that no loss can reach."""
        excess = len(tokens) - self.max_length
        status = "ok"
        if excess > 0 and self.truncation == "truncate-prompt":
            prompt_length = len(list(takewhile(lambda m: not m, mask)))
            if prompt_length <= excess:
                status = "too_long"
            tokens, mask = tokens[excess:], mask[excess:]
        elif excess > 0 and self.truncation == "truncate-completion":
            tokens, mask = tokens[: self.max_length], mask[: self.max_length]
        elif excess > 0:
            status = "too_long"
        loss_mask = np.array(mask, dtype=bool)
        loss_mask[:1] = False
        if status == "ok" and not loss_mask.any():
            status = "no_loss_tokens"
        sequence = TokenSequence(np.array(tokens, dtype=np.int32), loss_mask)
        return Sample(sample_id, row, source, (sequence,), truncated=excess > 0 and self.truncation.startswith("truncate"), status=status)


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _plain_text(row: Mapping[str, Any], end: str) -> tuple[str | None, str] | None:
    """Prompt (None without one) and whole text of a row that is no conversation; None where it is one, or is no text."""
    if "text" in row:
        parts = [None, row["text"]]
    elif "instruction" in row:
        instruction, extra = row["instruction"], row.get("input")
        parts = [f"{instruction}\n{extra}\n" if extra else f"{instruction}\n", row["output"]] if isinstance(instruction, str) else []
    else:
        parts = [row.get("prompt"), row.get("completion")]
    if len(parts) != 2 or not isinstance(parts[1], str) or not isinstance(parts[0], str | None):
        return None
    prompt, completion = parts
    if not completion:  # an end token alone is nothing to learn from
        return prompt, prompt or ""
    return prompt, (prompt or "") + (completion if end and completion.endswith(end) else completion + end)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages with role and content, from either habit of writing them."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column} is {type(value).__name__ if value != [] else 'empty'}, not text or messages")
    names = {"human": "user", "gpt": "assistant"}
    messages = []
    for message in value:
        if isinstance(message, Mapping) and "from" in message and "value" in message:
            message = {"role": names.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise DataError(f"{column} holds a message without role and content")
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages
