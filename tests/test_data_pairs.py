"""Preference pairs and rollouts: the tokens of TRL's DPO trainer, and what a row that holds several sequences needs."""

from __future__ import annotations

import datasets
import pytest
from trl import DPOConfig, DPOTrainer

from selector.config import ScoreConfig
from selector.data.layout import recognize
from selector.data.rollouts import one_row_per_rollout
from selector.data.samples import Encoder
from selector.errors import DataError

USER = {"role": "user", "content": "What color is the sky?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("It is blue.", "It is green."))
PAIRS = {
    "plain": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "tokens that merge across the boundary": {"prompt": "The sky i", "chosen": "s blue.", "rejected": "n Rome"},
    "conversations": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "conversations without prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "text without prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "text that differs inside a word": {"chosen": "The sky is greyish.", "rejected": "The sky is green."},
    "one side begins with the other": {"chosen": "The sky is blue.", "rejected": "The sky is"},
    "an empty side": {"prompt": "The sky is", "chosen": " blue.", "rejected": ""},
    "a side that ends with the end token": {
        "prompt": "The sky is",
        "chosen": " blue.<|endoftext|>",
        "rejected": " green.",
    },
    "turns on one side": {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
}
GROUP = {"prompt": "Count:", "completions": [" one", " two three"], "advantages": [1.0, -1.0]}


def encode(tokenizer, rows, loss, max_length=512, truncation="error"):
    encoder = Encoder(tokenizer, max_length, truncation, loss)
    return list(encoder.encode(rows, [str(i) for i in range(len(rows))], [None] * len(rows)))


@pytest.mark.parametrize("name", PAIRS)
def test_tokens_and_masks_equal_those_of_the_dpo_trainer(tokenizer, small_llama, tmp_path, name):
    row = PAIRS[name]
    args = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=512)
    trainer = DPOTrainer(
        model=small_llama, ref_model=small_llama.__class__(small_llama.config), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([row]),
    )  # fmt: skip
    prepared = trainer.train_dataset[0]
    (sample,) = encode(tokenizer, [row], "dpo")
    assert sample.status == "ok"
    for side, sequence in zip(("chosen", "rejected"), sample.sequences, strict=True):
        prompt, completion = prepared["prompt_ids"], prepared[f"{side}_ids"]
        assert sequence.input_ids.tolist() == prompt + completion
        # the first token has no predecessor, so that it never enters a loss
        assert sequence.loss_mask.tolist()[1:] == ([False] * len(prompt) + [True] * len(completion))[1:]


def test_cutting_completions_equals_keep_start_of_the_dpo_trainer(tokenizer, small_llama, tmp_path):
    row = {"prompt": "The sky is", "chosen": " blue on most days", "rejected": " green"}
    args = DPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=6, truncation_mode="keep_start"
    )
    trainer = DPOTrainer(
        model=small_llama, ref_model=small_llama.__class__(small_llama.config), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([row]),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[0]])
    (sample,) = encode(tokenizer, [row], "dpo", 6, "truncate-completion")
    assert sample.truncated
    for i, sequence in enumerate(sample.sequences):
        length = int(batch["attention_mask"][i].sum())
        assert sequence.input_ids.tolist() == batch["input_ids"][i, :length].tolist()
        assert sequence.loss_mask.tolist() == batch["completion_mask"][i, :length].bool().tolist()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_side_alone_is_a_prompt_with_its_completion(tokenizer, side):
    pair = PAIRS["plain"]
    (alone,) = encode(tokenizer, [pair], side)
    (completion,) = encode(tokenizer, [{"prompt": pair["prompt"], "completion": pair[side]}], "response")
    assert len(alone.sequences) == 1
    assert alone.sequences[0].input_ids.tolist() == completion.sequences[0].input_ids.tolist()
    assert alone.sequences[0].loss_mask.tolist() == completion.sequences[0].loss_mask.tolist()


def test_a_prompt_in_text_beside_whole_conversations_is_taken_from_the_conversations(tokenizer):
    whole = {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (first,), (second,) = (encode(tokenizer, [row], "dpo") for row in (whole, PAIRS["conversations"]))
    assert [s.input_ids.tolist() for s in first.sequences] == [s.input_ids.tolist() for s in second.sequences]


def test_stored_reference_log_probabilities_travel_with_their_side(tokenizer):
    row = PAIRS["plain"] | {"ref_chosen_logps": -3.5, "ref_rejected_logps": -8.0}
    layout = recognize(list(row), ScoreConfig())
    rows = list(layout.rows(datasets.Dataset.from_list([row])))
    (sample,) = encode(tokenizer, rows, layout.loss)
    assert [sequence.reference for sequence in sample.sequences] == [-3.5, -8.0]


@pytest.mark.parametrize(
    ("row", "loss", "status"),
    [
        (PAIRS["plain"] | {"rejected": PAIRS["plain"]["chosen"]}, "dpo", "zero_gradient"),
        (
            PAIRS["plain"] | {"reference_chosen": -1.0, "reference_rejected": None},
            "dpo",
            "error: reference_rejected is NoneType",
        ),
        (PAIRS["plain"] | {"reference_chosen": -1.0}, "dpo", "error: one side of the pair has a reference"),
        (
            PAIRS["plain"] | {"reference_chosen": float("nan"), "reference_rejected": 0.0},
            "dpo",
            "error: reference_chosen is nan",
        ),
        (PAIRS["plain"] | {"rejected": None}, "dpo", "error: rejected is NoneType, not text"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "dpo", "error: chosen and rejected share no prompt"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "dpo", "error: prompt is a conversation"),
        (PAIRS["an empty side"], "rejected", "no_loss_tokens"),
        (GROUP | {"advantages": [0.0, 0.0]}, "policy-gradient", "zero_gradient"),
        (GROUP | {"completions": [" one", " one"]}, "policy-gradient", "zero_gradient"),
        (
            GROUP | {"completions": [" one", " two", " one"], "advantages": [0.1 + 0.2, 0.0, -0.3]},
            "policy-gradient",
            "zero_gradient",
        ),
        (GROUP | {"completions": [" one", " two", " one"], "advantages": [0.5, -1.0, 0.5]}, "policy-gradient", "ok"),
        (GROUP | {"advantages": [1.0]}, "policy-gradient", "error: completions and advantages differ in number"),
        (GROUP | {"advantages": [1.0, None]}, "policy-gradient", "error: an advantage is NoneType"),
        (GROUP | {"advantages": [1.0, float("inf")]}, "policy-gradient", "error: an advantage is inf"),
        (GROUP | {"completions": None}, "policy-gradient", "error: completions is NoneType"),
        (GROUP | {"completions": [[], [[]]]}, "policy-gradient", "error: a completion is list, not text"),
        ({"prompt": "Count:", "completions": [[], []], "advantages": [1.0, -1.0]}, "policy-gradient", "no_loss_tokens"),
    ],
)
def test_rows_without_a_gradient_get_a_status(tokenizer, row, loss, status):
    assert encode(tokenizer, [row], loss)[0].status.startswith(status)


def test_a_reference_log_probability_does_not_survive_truncation(tokenizer):
    row = {"prompt": "The sky is", "chosen": " blue" * 20, "rejected": " green"}
    references = {"reference_chosen": -3.5, "reference_rejected": -8.0}
    (without,) = encode(tokenizer, [row], "dpo", 12, "truncate-completion")
    (stored,) = encode(tokenizer, [row | references], "dpo", 12, "truncate-completion")
    assert (without.status, without.truncated) == ("ok", True)
    assert stored.status.startswith("error: a reference log-probability does not hold")


def test_every_side_of_a_pair_has_to_fit(tokenizer):
    row = {"prompt": "The sky is", "chosen": " blue" * 20, "rejected": " green"}
    assert encode(tokenizer, [row], "dpo", 12, "skip")[0].status == "too_long"
    assert encode(tokenizer, [row], "rejected", 12, "skip")[0].status == "ok"


def test_rollouts_are_text_messages_or_the_very_tokens_that_were_generated(tokenizer):
    (text,) = encode(tokenizer, [GROUP], "policy-gradient")
    assert [tokenizer.decode(s.input_ids[s.loss_mask]) for s in text.sequences] == [
        " one<|endoftext|>",
        " two three<|endoftext|>",
    ]
    assert [s.advantage for s in text.sequences] == [1.0, -1.0]
    messages = {"prompt": [USER], "completions": [[GOOD], [BAD]], "advantages": [1.0, -1.0]}
    answers = messages | {"completions": [GOOD["content"], BAD["content"]]}
    first, second = encode(tokenizer, [messages, answers], "policy-gradient")
    assert [s.input_ids.tolist() for s in first.sequences] == [s.input_ids.tolist() for s in second.sequences]
    (generated,) = encode(tokenizer, [messages | {"completions": [[9, 8, 7], [6]]}], "policy-gradient")
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert [s.input_ids.tolist() for s in generated.sequences] == [[*prompt, 9, 8, 7], [*prompt, 6]]
    assert [int(s.loss_mask.sum()) for s in generated.sequences] == [3, 1]


def test_groups_taken_apart_hold_the_same_rollouts(tokenizer):
    rows = [GROUP | {"id": "a", "source": "x"}, GROUP | {"prompt": "Again:", "id": "b", "source": "y"}]
    dataset = datasets.Dataset.from_list(
        [*rows, {"id": "c", "source": "z", "prompt": "None", "completions": None, "advantages": [1.0]}]
    )
    config = ScoreConfig(id_column="id")
    groups = recognize(dataset.column_names, config)
    flat = one_row_per_rollout(dataset, groups)
    single = recognize(flat.column_names, config)
    assert (groups.format, single.format, single.loss) == ("rollouts", "rollout", "policy-gradient")
    assert flat["id"][:] == ["a/0", "a/1", "b/0", "b/1", "c/0"]
    assert flat["group"][:] == [0, 0, 1, 1, 2]
    assert flat["source"][:] == ["x", "x", "y", "y", "z"]
    *rollouts, broken = encode(tokenizer, list(single.rows(flat)), "policy-gradient")
    whole = encode(tokenizer, list(groups.rows(dataset)), "policy-gradient")[:2]
    assert [r.sequences[0].input_ids.tolist() for r in rollouts] == [
        s.input_ids.tolist() for group in whole for s in group.sequences
    ]
    assert broken.status == "error: a completion is NoneType, not text"


# recognition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "asked", "format_", "loss"),
    [
        (["prompt", "completion"], "auto", "prompt-completion", "response"),
        (["prompt", "completion", "label"], "auto", "prompt-completion", "response"),
        (["prompt", "chosen", "rejected"], "auto", "preference", "dpo"),
        (["chosen", "rejected", "messages"], "auto", "preference", "dpo"),
        (["chosen", "rejected", "messages"], "response", "messages", "response"),
        (["chosen", "rejected"], "rejected", "preference", "rejected"),
        (["prompt", "completions", "advantages"], "auto", "rollouts", "policy-gradient"),
        (["prompt", "completion", "advantage"], "auto", "rollout", "policy-gradient"),
        (["prompt", "completion", "advantage"], "response", "prompt-completion", "response"),
        (["conversations", "tools"], "auto", "messages", "response"),
    ],
)
def test_loss_and_format_go_by_the_columns_and_by_what_was_asked(columns, asked, format_, loss):
    layout = recognize(columns, ScoreConfig(loss=asked))
    assert (layout.format, layout.loss) == (format_, loss)
    assert f"loss = {loss}" in layout.describe()


def test_a_loss_that_the_columns_do_not_have_is_refused():
    with pytest.raises(DataError, match="the columns fit no format") as caught:
        recognize(["prompt", "completion"], ScoreConfig(loss="dpo"))
    assert "chosen + rejected" in str(caught.value)
    with pytest.raises(DataError, match="rows of format text have no dpo loss"):
        recognize(["text"], ScoreConfig(format="text", loss="dpo"))
