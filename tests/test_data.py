"""Rows become the tokens and labels that TRL's own preparation gives, and files become rows or an explanation."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from selector.config import ScoreConfig
from selector.data.ids import column_ids, content_hash, content_ids
from selector.data.layout import recognize
from selector.data.load import load_rows
from selector.data.samples import Encoder
from selector.errors import DataError

CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "Eight, of course."},
]

ROWS = {
    "plain prompt and completion": {"prompt": "The sky is", "completion": " blue on most days."},
    "tokens that merge across the boundary": {"prompt": "The sky i", "completion": "s blue."},
    "completion that ends with the end token": {"prompt": "Say", "completion": " nothing.<|endoftext|>"},
    "empty prompt": {"prompt": "", "completion": "Once upon a time."},
    "conversation as prompt and completion": {"prompt": CHAT[:2], "completion": CHAT[2:3]},
    "text": {"text": "A sentence that is all there is."},
}


def encode(tokenizer, rows, max_length=512, truncation="error", ids=None):
    layout = recognize(list(rows[0]), ScoreConfig())
    dataset = datasets.Dataset.from_list(rows)
    encoder = Encoder(tokenizer, max_length, truncation)
    return list(encoder.encode(layout.rows(dataset), ids or [str(i) for i in range(len(rows))], [None] * len(rows)))


@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_labels_equal_those_of_the_sft_trainer(tokenizer, small_llama, tmp_path, name):
    rows = [ROWS[name]] * 2
    args = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=512, bf16=False)
    trainer = SFTTrainer(
        model=small_llama, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    prepared = trainer.train_dataset[0]
    sequence = encode(tokenizer, rows)[0].sequences[0]
    assert sequence.input_ids.tolist() == prepared["input_ids"]
    # the first token has no predecessor, so that its label never enters a loss
    labels = np.where(sequence.loss_mask, sequence.input_ids, -100).tolist()
    assert labels[1:] == prepared["labels"][1:]


def test_conversation_has_loss_on_the_assistants_turns_only(tokenizer):
    (sample,) = encode(tokenizer, [{"messages": CHAT}])
    sequence = sample.sequences[0]
    spoken = tokenizer.decode(sequence.input_ids[sequence.loss_mask])
    assert spoken == "Four.<|im_end|>\nEight, of course.<|im_end|>\n"


def test_from_value_conversations_are_the_same_as_role_content(tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    (first,), (second,) = encode(tokenizer, [{"messages": CHAT}]), encode(tokenizer, [{"conversations": other}])
    assert first.sequences[0].input_ids.tolist() == second.sequences[0].input_ids.tolist()


def test_template_that_rewrites_earlier_turns_is_refused_by_status(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (sample,) = encode(tokenizer, [{"messages": CHAT}])
    assert sample.status.startswith("error: the chat template renders")


def test_instruction_and_input_are_joined_by_lines(tokenizer):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ]
    texts = [tokenizer.decode(sample.sequences[0].input_ids) for sample in encode(tokenizer, rows)]
    assert texts == ["Add.\n1 2\n3<|endoftext|>", "Hi\nHello<|endoftext|>"]


@pytest.mark.parametrize(
    ("truncation", "status", "length", "loss_tokens"),
    [("skip", "too_long", None, None), ("truncate-prompt", "ok", 20, None), ("truncate-completion", "ok", 20, 0)],
)
def test_truncation_policies(tokenizer, truncation, status, length, loss_tokens):
    row = {"prompt": "word " * 12, "completion": "answer " * 8}
    (whole,) = encode(tokenizer, [row])
    (cut,) = encode(tokenizer, [row], max_length=20, truncation=truncation)
    assert cut.status == status
    assert cut.truncated == (length is not None)
    if truncation == "truncate-prompt":
        assert cut.n_tokens == 20
        assert cut.n_loss_tokens == whole.n_loss_tokens
        assert cut.sequences[0].input_ids.tolist() == whole.sequences[0].input_ids[-20:].tolist()
    if truncation == "truncate-completion":
        assert cut.sequences[0].input_ids.tolist() == whole.sequences[0].input_ids[:20].tolist()
        assert cut.n_loss_tokens < whole.n_loss_tokens


def test_prompt_that_alone_is_too_long_is_never_cut_into_the_completion(tokenizer):
    (sample,) = encode(
        tokenizer, [{"prompt": "Hi", "completion": "answer " * 40}], max_length=20, truncation="truncate-prompt"
    )
    assert sample.status == "too_long"


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"prompt": "Hi", "completion": ""}, "no_loss_tokens"),
        ({"prompt": "Hi", "completion": None}, "error: "),
        ({"prompt": None, "completion": "Hello there"}, "ok"),
        ({"text": ""}, "no_loss_tokens"),
        ({"text": None}, "error: "),
        ({"messages": []}, "error: messages is empty"),
        ({"messages": CHAT[:2]}, "no_loss_tokens"),
    ],
)
def test_rows_that_hold_nothing_to_learn_get_a_status(tokenizer, row, status):
    assert encode(tokenizer, [row])[0].status.startswith(status)


# ids -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(0, 12))
def test_content_ids_are_unique_and_do_not_move_when_rows_are_appended(contents, cut):
    ids = content_ids(contents)
    assert len(set(ids)) == len(ids)
    assert content_ids(contents[:cut]) == ids[:cut]


def test_content_hash_ignores_missing_roles_and_key_order():
    assert content_hash({"a": 1, "b": None}) == content_hash({"a": 1})
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash({"a": "1"}) != content_hash({"a": 1})


def test_id_column_with_gaps_or_repetitions_is_refused():
    with pytest.raises(DataError, match="no id in 1 rows"):
        column_ids(["a", None], "id")
    with pytest.raises(DataError, match="repeats 1 ids"):
        column_ids(["a", "b", "a"], "id")


# files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ""])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": "a, b", "completion": "c"}, {"prompt": "d", "completion": "e\nf"}]
    dataset = datasets.Dataset.from_list(rows)
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        dataset.to_parquet(path)
    elif suffix == ".csv":
        dataset.to_csv(path)
    elif suffix == ".tsv":
        dataset.to_csv(path, sep="\t")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix:
        dataset.to_json(path, compression="gzip" if suffix.endswith(".gz") else None)
    else:
        dataset.save_to_disk(path)
    assert load_rows(str(path)).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "empty|cannot be read"),
        ("data.jsonl", b'{"prompt": "a"\n', "cannot be read"),
        ("data.parquet", b"PAR1 but not really", "cannot be read"),
        ("data.docx", b"words", "of no known kind"),
        ("data.csv", b"prompt,completion\n", "is empty"),
    ],
)
def test_unreadable_files_are_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(path))


def test_missing_file_and_split_are_explained(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load_rows(str(tmp_path / "nothing.jsonl"))
    datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="no split 'train'") as caught:
        load_rows(str(tmp_path / "d"))
    assert "test" in str(caught.value)


@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_formats_of_a_data_set_do_not_touch_contents_and_transforms_do(format):
    columns = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
    columns |= {"reference_chosen": [-1.1, -123.456789], "reference_rejected": [-2.0, -3.0]}
    data = datasets.Dataset.from_dict(columns)
    layout = recognize(data.column_names, ScoreConfig(loss="dpo"))
    plain = list(layout.rows(data))
    assert plain == [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert list(layout.rows(data.with_format(format))) == plain
    louder = data.with_transform(lambda rows: rows | {"prompt": [text.upper() for text in rows["prompt"]]})
    assert [row["prompt"] for row in layout.rows(louder)] == ["A", "B"]
