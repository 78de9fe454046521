"""Rows in the shapes that training frameworks document, and the settings that make them find the file.

    trl             prompt / completion, messages, text, or prompt / chosen / rejected, as text or conversations
    llama-factory   OpenAI messages with `dataset_info.json`; preference pairs as its sharegpt ranking format
    axolotl         messages with the `datasets:` section of its YAML
    ms-swift        messages, with `rejected_messages` for pairs
    verl            Parquet: `messages` for SFT; `prompt`, `data_source`, `ability`, `reward_model` and `extra_info`
                    for RL, the stored response as ground truth

Every row keeps the sample's id, score and weight, which the frameworks pass over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from selector.data.exchanges import Message, exchanges

SINGLE = ("prompt-completion", "messages", "instruction", "text")
PREFERENCE = "preference"
NAME = "selected"
"""What the data set is called in settings."""


@dataclass(frozen=True)
class Framework:
    """How one framework wants its rows."""

    formats: tuple[str, ...]
    """Formats of rows that it can read."""
    convert: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]]
    """From a row by role, and what is known of the sample, to the row that is written."""
    settings: Callable[[str, str], dict[str, dict[str, Any]]]
    """From the format and the name of the data file to files of settings, by name."""
    parquet: bool = False
    """Whether rows are written as Parquet rather than JSON lines."""


class Chat(NamedTuple):
    """A row as a conversation."""

    prompt: list[Message]
    response: list[Message]
    rejected: list[Message]
    """Empty but for preference pairs."""


def chat(row: Mapping[str, Any]) -> Chat:
    """Read a row as a conversation; a plain prompt is the user's, a plain response the assistant's.

    Args:
        row: contents by role, in any format but rollouts.

    Raises:
        DataError: the row holds something else than its format asks for.
    """
    first, *others = exchanges(row, "dpo" if "chosen" in row else "response")
    if first.prompt is None and not isinstance(first.completion, str):
        messages = _said(first.completion)
        turn = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return Chat(messages[:turn], messages[turn:], [])
    prompt = first.prompt
    if isinstance(prompt, str):
        # the line break that separates an instruction from its answer belongs to neither
        text = prompt.removesuffix("\n") if "instruction" in row else prompt
        prompt = [{"role": "user", "content": text}] if text else []
    return Chat(prompt or [], _said(first.completion), _said(others[0].completion) if others else [])


def _said(completion: Any) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)


def _trl(row: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    if "text" in row or "messages" in row:
        return {**{role: row[role] for role in ("text", "messages") if role in row}, **about}
    first, *others = exchanges(row, "dpo" if "chosen" in row else "response")
    if others:
        return {"prompt": first.prompt, "chosen": first.completion, "rejected": others[0].completion, **about}
    return {"prompt": first.prompt, "completion": first.completion, **about}


def _messages(row: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """What LLaMA-Factory and Axolotl read."""
    if "text" in row:
        return {"text": row["text"], **about}
    prompt, response, rejected = chat(row)
    if not rejected:
        return {"messages": prompt + response, **about}
    # they take one answer: what was said before it is prompt
    return {"messages": prompt + response[:-1], "chosen": response[-1], "rejected": rejected[-1], **about}


def _llama_factory_settings(format: str, file: str) -> dict[str, dict[str, Any]]:
    if format == "text":
        return {"dataset_info.json": {NAME: {"file_name": file, "columns": {"prompt": "text"}}}}
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
    }
    entry: dict[str, Any] = {
        "file_name": file,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    if format == PREFERENCE:
        entry["ranking"] = True
        entry["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
    return {"dataset_info.json": {NAME: entry}}


def _axolotl_settings(format: str, file: str) -> dict[str, dict[str, Any]]:
    entry: dict[str, Any] = {"path": file, "ds_type": "json"}
    if format == "text":
        return {"axolotl.yaml": {"datasets": [{**entry, "type": "completion", "field": "text"}]}}
    mapping = {"role": "role", "content": "content"}
    entry |= {"field_messages": "messages", "message_property_mappings": mapping}
    if format == PREFERENCE:
        fields = {"type": "chat_template.default", "field_chosen": "chosen", "field_rejected": "rejected"}
        return {"axolotl.yaml": {"rl": "dpo", "datasets": [{**entry, **fields}]}}
    return {"axolotl.yaml": {"datasets": [{**entry, "type": "chat_template"}]}}


def _ms_swift(row: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    prompt, response, rejected = chat(row)
    pair = {"rejected_messages": prompt + rejected} if rejected else {}
    return {"messages": prompt + response, **pair, **about}


def _verl(row: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    prompt, response, _ = chat(row)
    said = [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt + response]
    return {
        "data_source": about["source"] or NAME,
        "prompt": said[: len(prompt)],
        "ability": about["source"] or "general",
        "reward_model": {"style": "rule", "ground_truth": said[-1]["content"]},
        "extra_info": {name: about[name] for name in ("selector_id", "selector_score", "selector_weight")},
        "messages": said,
    }


def _none(format: str, file: str) -> dict[str, dict[str, Any]]:
    return {}


FRAMEWORKS = {
    "trl": Framework((*SINGLE, PREFERENCE), _trl, _none),
    "llama-factory": Framework((*SINGLE, PREFERENCE), _messages, _llama_factory_settings),
    "axolotl": Framework((*SINGLE, PREFERENCE), _messages, _axolotl_settings),
    "ms-swift": Framework((*SINGLE, PREFERENCE), _ms_swift, _none),
    "verl": Framework(("prompt-completion", "messages", "instruction"), _verl, _none, parquet=True),
}
