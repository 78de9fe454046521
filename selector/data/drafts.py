"""Write exchanges as text, and say where in the text the loss lies.

A draft names all texts that have to be tokenized, so that a tokenizer gets those of many rows at once. The loss begins
where the tokens of the prompt alone and of the whole diverge. In a conversation it is on the assistant's turns: where the
chat template marks them, on what it marks; elsewhere on what each turn adds to the rendered conversation, after a check
that the template only ever adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from selector.data.exchanges import Exchange, Message
from selector.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a chat template marks what the assistant generates."""


class Encoded(NamedTuple):
    """Tokens of one sequence and which of them carry loss."""

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]

    @property
    def size(self) -> int:
        """How many tokens it holds."""
        return len(self.input_ids)


@dataclass(frozen=True, eq=False, slots=True)
class Draft:
    """One sequence in terms of texts still to be tokenized."""

    whole: str
    spans: tuple[tuple[str | None, str | None], ...]
    """Loss lies between what these beginnings of the whole have in common with it; None for its very start or end."""
    template: bool = False
    """Whether a chat template has written all special tokens already."""
    generated: tuple[int, ...] | None = None
    """Tokens that follow the whole and carry loss, as a policy generated them."""

    def texts(self) -> Iterator[str]:
        """Everything to tokenize."""
        yield self.whole
        for span in self.spans:
            yield from (text for text in span if text is not None)

    @property
    def size(self) -> int:
        """How many characters are to be tokenized."""
        return sum(map(len, self.texts()))

    def encode(self, tokens: Mapping[str, Int32[np.ndarray, " _"]]) -> Encoded:
        """Put the tokens together.

        Args:
            tokens: of every text of `texts`.
        """
        whole = tokens[self.whole]
        mask = np.zeros(len(whole), dtype=bool)
        for before, until in self.spans:
            start = 0 if before is None else common_prefix_length(tokens[before], whole)
            end = len(whole) if until is None else common_prefix_length(tokens[until], whole)
            mask[start:end] = True
        if self.generated is None:
            return Encoded(whole, mask)
        generated = np.array(self.generated, dtype=np.int32)
        return Encoded(np.concatenate([whole, generated]), np.concatenate([mask, np.ones(len(generated), dtype=bool)]))


def common_prefix_length(first: Int32[np.ndarray, " A"], second: Int32[np.ndarray, " B"]) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


@dataclass(frozen=True)
class Writer:
    """Writes exchanges as text, with one tokenizer's end token and chat template.

    Args:
        tokenizer: of the model that is going to be trained.
        end_empty: write the end token even after an empty completion, which is then something to learn from.
    """

    tokenizer: PreTrainedTokenizerBase
    end_empty: bool

    def draft(self, exchange: Exchange, row: Mapping[str, Any]) -> Draft | Encoded:
        """Write one exchange.

        Args:
            exchange: of the row.
            row: holds `tools` and `chat_template_kwargs`, where the data set has them.

        Returns:
            A draft, or at once the tokens where only the chat template knows which carry loss.

        Raises:
            DataError: the chat template cannot render it, or a text is no valid Unicode.
        """
        prompt, completion = exchange.prompt, exchange.completion
        if isinstance(completion, tuple):
            drafted = self._generated(prompt, completion, row)
        elif isinstance(completion, str):
            assert prompt is None or isinstance(prompt, str)
            drafted = self._plain(prompt, completion)
        elif prompt is None:
            drafted = self._assistant_turns(completion, _template_arguments(row))
        else:
            assert isinstance(prompt, list)
            arguments = _template_arguments(row)
            before = self._render(prompt, arguments, add_generation_prompt=True)
            drafted = Draft(self._render([*prompt, *completion], arguments), ((before, None),), template=True)
        if isinstance(drafted, Draft):
            try:
                drafted.whole.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"a text is no valid Unicode: {error.reason}") from error
        return drafted

    @property
    def _end(self) -> str:
        return str(self.tokenizer.eos_token or "")

    def _plain(self, prompt: str | None, completion: str) -> Draft:
        end = self._end
        # after an empty completion the end token alone is no response to learn from
        ended = completion if completion.endswith(end) or not (completion or self.end_empty) else completion + end
        return Draft((prompt or "") + ended, ((prompt, None),))

    def _generated(
        self, prompt: str | list[Message] | None, completion: tuple[int, ...], row: Mapping[str, Any]
    ) -> Draft:
        if completion and not 0 <= min(completion) <= max(completion) < len(self.tokenizer):
            raise DataError(f"a completion holds tokens outside of the tokenizer's 0 to {len(self.tokenizer) - 1}")
        if isinstance(prompt, list):
            before = self._render(prompt, _template_arguments(row), add_generation_prompt=True)
            return Draft(before, (), template=True, generated=completion)
        return Draft(prompt or "", (), generated=completion)

    def _assistant_turns(self, messages: list[Message], arguments: dict[str, Any]) -> Draft | Encoded:
        """A conversation with loss on what the assistant says."""
        if self._marks_generations(arguments):
            encoded = self._apply(
                messages, arguments, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return Encoded(np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool))
        whole = self._render(messages, arguments)
        spans: list[tuple[str | None, str | None]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = None
            if turn:
                context = self._beginning(messages[:turn], whole, arguments)
                before = self._render(messages[:turn], arguments, add_generation_prompt=True)
                if not before.startswith(context):
                    raise DataError("the chat template renders a conversation's beginning differently before an answer")
            last = turn + 1 == len(messages)
            spans.append((before, None if last else self._beginning(messages[: turn + 1], whole, arguments)))
        return Draft(whole, tuple(spans), template=True)

    def _beginning(self, messages: list[Message], whole: str, arguments: dict[str, Any]) -> str:
        """The rendered beginning of a conversation, checked to be the beginning of the whole one."""
        text = self._render(messages, arguments)
        if not whole.startswith(text):
            # some templates close what they render with the end token, which is not there when it goes on
            text = text.removesuffix(self._end)
        if not whole.startswith(text):
            raise DataError(
                "the chat template renders a conversation's beginning differently once it goes on, "
                "and does not mark what the assistant generates; give one that does with --chat-template"
            )
        return text

    def _marks_generations(self, arguments: dict[str, Any]) -> bool:
        try:
            template = self.tokenizer.get_chat_template(arguments.get("chat_template"), arguments["tools"])
        except ValueError as error:
            raise DataError("the tokenizer has no chat template for conversations") from error
        return GENERATION.search(template) is not None

    def _render(self, messages: list[Message], arguments: dict[str, Any], add_generation_prompt: bool = False) -> str:
        return self._apply(messages, arguments, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: list[Message], arguments: dict[str, Any], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **arguments, **options)
        except Exception as error:  # a template is a program, which can fail in any way on contents it was not made for
            text = str(error).splitlines()
            raise DataError(f"the chat template cannot render: {text[0] if text else type(error).__name__}") from error


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row passes to the chat template besides its messages."""
    tools, extra = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"tools is no JSON: {error.msg}") from error
    if not isinstance(tools, list | None) or not isinstance(extra, Mapping):
        raise DataError("tools is no list, or chat_template_kwargs no mapping")
    return {"tools": tools, **extra}
