"""Conversations: loss on the assistant's turns alone, and the tokens that TRL's own preparation gives."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import trl
from trl import SFTConfig, SFTTrainer

from selector.assets import TINY_MODEL
from selector.data.samples import Encoder
from selector.errors import ModelError
from selector.scorer import load_model

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "Eight, of course."},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Ends whatever it renders with the end token, as Phi 3 does."""
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def encode(tokenizer, rows, loss="response"):
    return list(
        Encoder(tokenizer, 512, "error", loss).encode(rows, [str(i) for i in range(len(rows))], [None] * len(rows))
    )


def prepared_by_trl(tokenizer, model, rows, tmp_path, **options):
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=512, bf16=False, **options)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return list(trainer.train_dataset)


def assert_same_rows(samples, prepared):
    for sample, row in zip(samples, prepared, strict=True):
        (sequence,) = sample.sequences
        assert sequence.input_ids.tolist() == row["input_ids"]
        labels = np.where(sequence.loss_mask, sequence.input_ids, -100).tolist()
        # the first token has no predecessor, so that its label never enters a loss
        assert labels[1:] == row["labels"][1:]


def spoken(tokenizer, sample):
    (sequence,) = sample.sequences
    return tokenizer.decode(sequence.input_ids[sequence.loss_mask])


def test_marked_generations_equal_assistant_only_loss_of_the_sft_trainer(tokenizer, small_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    samples = encode(tokenizer, rows)
    assert spoken(tokenizer, samples[0]) == "Four.<|im_end|>Eight, of course.<|im_end|>"
    assert_same_rows(samples, prepared_by_trl(tokenizer, small_llama, rows, tmp_path, assistant_only_loss=True))


@pytest.mark.parametrize("name", ["gemma", "phi3", "qwen3"])
def test_prefix_difference_equals_the_template_that_the_sft_trainer_puts_in_its_place(
    tokenizer, small_llama, tmp_path, monkeypatch, name
):
    """TRL swaps a known template without marks for a training variant with them."""
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / f"{name}.jinja").read_text())
    # Qwen 3 takes an earlier answer's empty thought away once the conversation goes on
    rows = [{"messages": CHAT[:2] if name == "qwen3" else CHAT}]
    samples = encode(tokenizer, rows)
    if name == "qwen3":
        assert spoken(tokenizer, samples[0]).startswith("<think>")
    assert_same_rows(samples, prepared_by_trl(tokenizer, small_llama, rows, tmp_path, assistant_only_loss=True))


def test_training_templates_need_no_prefix_difference(tokenizer, small_llama, tmp_path, monkeypatch):
    rows = [{"messages": CHAT}]
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / "qwen3.jinja").read_text())
    assert "does not mark what the assistant generates" in encode(tokenizer, rows)[0].status
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / "qwen3_training.jinja").read_text())
    assert_same_rows(
        encode(tokenizer, rows), prepared_by_trl(tokenizer, small_llama, rows, tmp_path, assistant_only_loss=True)
    )


def test_an_end_token_that_only_closes_the_rendering_is_no_part_of_earlier_turns(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CLOSING)
    (sample,) = encode(tokenizer, [{"messages": CHAT}])
    assert spoken(tokenizer, sample) == "Four.<|im_end|>Eight, of course.<|im_end|><|endoftext|>"


def test_tools_and_template_arguments_reach_the_template_as_they_do_in_the_sft_trainer(
    tokenizer, small_llama, tmp_path, monkeypatch
):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [
        {
            "prompt": CHAT[:1],
            "completion": CHAT[1:2],
            "tools": json.dumps([TOOL]),
            "chat_template_kwargs": {"style": "short"},
        },
        {"prompt": CHAT[:1], "completion": CHAT[1:2], "tools": "[]", "chat_template_kwargs": {"style": "long"}},
    ]
    samples = encode(tokenizer, rows)
    assert tokenizer.decode(samples[0].sequences[0].input_ids).startswith('[{"type": "function"')
    assert_same_rows(samples, prepared_by_trl(tokenizer, small_llama, rows, tmp_path))


def test_a_call_of_a_tool_is_an_answer_without_content(tokenizer, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls[0].function.name }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
    }
    (sample,) = encode(tokenizer, [{"messages": [CHAT[0], call, {"role": "tool", "content": "4"}, CHAT[1]]}])
    assert spoken(tokenizer, sample) == "addFour."


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"messages": [{"role": "user"}]}, "error: messages holds a message without content"),
        ({"messages": [{"content": "Hi"}]}, "error: messages holds a message without role"),
        ({"messages": [None]}, "error: messages holds a message without role"),
        ({"messages": "Hi"}, "error: messages is str, not messages"),
        ({"messages": CHAT, "tools": "{"}, "error: tools is no JSON"),
        ({"messages": CHAT, "tools": 3}, "error: tools is no list"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "error: the chat template cannot render"),
        (
            {"messages": [{"role": "user", "content": ["a"]}, CHAT[1]]},
            "error: messages holds a message whose content is list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT[1]]},
            "error: the chat template cannot render",
        ),
        ({"prompt": CHAT[:1], "completion": "Four."}, "error: completion is str, not messages"),
        ({"prompt": "Two and two?", "completion": CHAT[1:2]}, "error: completion is list, not text"),
    ],
)
def test_conversations_that_cannot_be_rendered_say_why(tokenizer, row, status):
    (sample,) = encode(tokenizer, [row])
    assert sample.status.startswith(status)


def test_conversations_without_a_chat_template_say_so(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (sample,) = encode(tokenizer, [{"messages": CHAT}])
    assert sample.status == "error: the tokenizer has no chat template for conversations"


def test_a_chat_template_from_a_file_takes_the_place_of_the_tokenizers_own(tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    _, tokenizer = load_model(str(TINY_MODEL), chat_template=tmp_path / "marked.jinja")
    (sample,) = encode(tokenizer, [{"messages": CHAT}])
    assert spoken(tokenizer, sample) == "Four.<|im_end|>Eight, of course.<|im_end|>"
    with pytest.raises(ModelError, match="the chat template cannot be read"):
        load_model(str(TINY_MODEL), chat_template=tmp_path / "missing.jinja")
