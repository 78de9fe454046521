"""What a row says: prompts and the responses that carry loss, whatever way the data set has of writing them.

A row gives one exchange, or several whose gradients add: the two sides of a preference pair, the rollouts of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selector.config import LossName
from selector.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Exchange:
    """A prompt and its completion, not yet tokenized."""

    prompt: str | list[Message] | None
    """None where the completion is a text or a conversation of its own."""
    completion: str | list[Message] | tuple[int, ...]
    """Text, messages, or the very tokens that a policy generated."""
    reference: float | None = None
    """Log-probability of the completion under the reference model, nats."""
    advantage: float | None = None
    """How much better than its group a rollout was."""


def exchanges(row: Mapping[str, Any], loss: LossName = "response") -> list[Exchange]:
    """Read a row.

    Args:
        row: contents by role, as `Layout.rows` gives them.
        loss: which parts of a preference pair are wanted; no other format depends on it.

    Raises:
        DataError: the row holds something else than its format asks for.
    """
    if "text" in row:
        return [Exchange(None, _text(row["text"], "text"))]
    if "messages" in row:
        return [Exchange(None, _messages(row["messages"], "messages"))]
    if "instruction" in row:
        instruction, extra = _text(row["instruction"], "instruction"), row.get("input")
        prompt = f"{instruction}\n{_text(extra, 'input')}\n" if extra else f"{instruction}\n"
        return [Exchange(prompt, _text(row["output"], "output"))]
    if "chosen" in row:
        return _pair(row, loss)
    if "completions" in row:
        completions = _list(row["completions"], "completions")
        advantages = _list(row["advantages"], "advantages")
        if len(completions) != len(advantages):
            raise DataError(f"completions and advantages differ in number: {len(completions)} and {len(advantages)}")
        return [_rollout(row["prompt"], *rollout) for rollout in zip(completions, advantages, strict=True)]
    if "advantage" in row:
        return [_rollout(row["prompt"], row["completion"], row["advantage"])]
    if isinstance(row["prompt"], list):
        return [Exchange(_messages(row["prompt"], "prompt"), _messages(row["completion"], "completion"))]
    return [Exchange(_text(row["prompt"] or "", "prompt"), _text(row["completion"], "completion"))]


def _pair(row: Mapping[str, Any], loss: LossName) -> list[Exchange]:
    """Both sides of a preference pair, or the one that is wanted."""
    if isinstance(row["chosen"], list):
        chosen, rejected = _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")
    else:
        chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = _messages(prompt, "prompt")
    if isinstance(prompt, type(chosen)):
        pass
    elif prompt is None or isinstance(chosen, list):  # a text beside conversations repeats what both of them begin with
        length = _shared_prompt(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        raise DataError("prompt is a conversation, chosen and rejected are text")
    if not prompt and isinstance(prompt, list):
        raise DataError("chosen and rejected share no prompt")
    if loss != "dpo":
        return [Exchange(prompt, chosen if loss == "chosen" else rejected)]
    references = [
        _number(row[role], role) if role in row else None for role in ("reference_chosen", "reference_rejected")
    ]
    if (references[0] is None) != (references[1] is None):
        raise DataError("one side of the pair has a reference log-probability, the other has none")
    return [Exchange(prompt, side, reference) for side, reference in zip((chosen, rejected), references, strict=True)]


def _shared_prompt(chosen: str | list[Message], rejected: str | list[Message]) -> int:
    """How many messages or characters both sides begin with, as TRL's `extract_prompt` counts them."""
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:
        return 0
    # where one side begins with the whole of the other, its last element is left to complete
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    # a space before the completions' first words belongs to them
    return length - 1 if length and chosen[length - 1] == " " else length


def _rollout(prompt: Any, completion: Any, advantage: Any) -> Exchange:
    """One rollout of a policy."""
    prompt = _messages(prompt, "prompt") if isinstance(prompt, list) else _text(prompt or "", "prompt")
    if isinstance(completion, list) and all(type(token) is int for token in completion):
        completion = tuple(completion)
    elif isinstance(prompt, list):
        spoken = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        completion = _messages(spoken, "a completion")
    else:
        completion = _text(completion, "a completion")
    return Exchange(prompt, completion, advantage=_number(advantage, "an advantage"))


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{role} is {_kind(value)}, not text")
    return value


def _list(value: Any, role: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{role} is {_kind(value)}, not a list")
    return value


def _number(value: Any, role: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{role} is {value if isinstance(value, float) else _kind(value)}, not a finite number")
    return float(value)


def _messages(value: Any, role: str) -> list[Message]:
    """Messages with role and content, from either habit of writing them."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{role} is {_kind(value)}, not messages")
    names = {"human": "user", "gpt": "assistant"}
    messages = []
    for message in value:
        if isinstance(message, Mapping) and isinstance(message.get("from"), str) and "value" in message:
            message = {"role": names.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{role} holds a message without role")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"{role} holds a message without content")
        # some templates render anything else as nothing
        if not (
            isinstance(content, str | None)
            or (isinstance(content, list) and all(isinstance(c, Mapping) for c in content))
        ):
            raise DataError(f"{role} holds a message whose content is {_kind(content)}, not text")
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _kind(value: Any) -> str:
    """What a value is, for messages."""
    return "empty" if isinstance(value, list | str) and not value else type(value).__name__
