"""Whatever rows hold, encoding gives one sample per row with a status, and a row's neighbors do not matter."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selector.config import ScoreConfig
from selector.data import samples
from selector.data.ids import content_hash
from selector.data.layout import FORMATS, recognize
from selector.data.rollouts import one_row_per_rollout
from selector.data.samples import Encoder

MAX_LENGTH = 48
# every code point, lone surrogates among them, and pieces that tokenizers and templates treat apart
TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),
    st.sampled_from(
        ["", " ", "\n\n", "<|endoftext|>", "<|im_start|>", "{{ 1 / 0 }}", "\x00", "\u202e\u200d", "x" * 3000, "\ud800"]
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "?"]), "content": TEXTS | st.none()}
    ),
    max_size=4,
)
GENERATED = st.lists(st.integers(0, 4000) | st.sampled_from([-1, 4096, 2**40]), max_size=5)
NUMBERS = st.floats() | st.integers(-3, 3) | st.booleans() | st.none()
ANYTHING = st.recursive(
    TEXTS | NUMBERS | MESSAGES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SPOKEN = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), TEXTS),
    min_size=1,
    max_size=3,
)
FINITE = st.sampled_from([-1.0, 0.0, 0.5])
LIKELY = {
    "messages": SPOKEN, "prompt": TEXTS | SPOKEN, "completion": TEXTS | SPOKEN | GENERATED,
    "completions": st.lists(TEXTS | SPOKEN | GENERATED, min_size=2, max_size=2), "advantages": st.lists(FINITE, min_size=2, max_size=2),
    "advantage": FINITE, "chosen": TEXTS | SPOKEN, "rejected": TEXTS | SPOKEN, "reference_chosen": FINITE, "reference_rejected": FINITE,
    "tools": st.none() | st.just("[]"), "chat_template_kwargs": st.none(),
}  # fmt: skip


def mostly(role):
    """What the role asks for, and one time in ten anything else."""
    return st.integers(0, 9).flatmap(lambda n: ANYTHING if n == 9 else LIKELY.get(role, TEXTS))


@st.composite
def data_sets(draw):
    """Rows of one format, and a loss that it has; most contents are of the right kind and none has to be."""
    kind = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    optional = draw(st.sets(st.sampled_from(kind.optional))) if kind.optional else set()
    contents = {role: mostly(role) for role in (*kind.required, *optional)}
    return draw(st.lists(st.fixed_dictionaries(contents), min_size=1, max_size=4)), draw(st.sampled_from(kind.losses))


def encode(tokenizer, rows, loss, truncation):
    rows = list(rows)
    return list(
        Encoder(tokenizer, MAX_LENGTH, truncation, loss).encode(
            rows, [str(i) for i in range(len(rows))], [None] * len(rows)
        )
    )


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data_sets(), st.sampled_from(["truncate-prompt", "truncate-completion", "skip", "error"]))
@example(([{"prompt": "", "completions": ["0", []], "advantages": [-1.0, -1.0]}], "policy-gradient"), "skip")
def test_any_row_becomes_a_sample_with_a_status(tokenizer, rows_and_loss, truncation):
    rows, loss = rows_and_loss
    together = encode(tokenizer, rows, loss, truncation)
    assert [sample.row for sample in together] == list(range(len(rows)))
    for row, sample in zip(rows, together, strict=True):
        assert len(content_hash(row)) == 16
        (alone,) = encode(tokenizer, [row], loss, truncation)
        assert (alone.status, alone.truncated) == (sample.status, sample.truncated)
        for first, second in zip(alone.sequences, sample.sequences, strict=True):
            np.testing.assert_array_equal(first.input_ids, second.input_ids)
            np.testing.assert_array_equal(first.loss_mask, second.loss_mask)
        if sample.status != "ok":
            continue
        assert sample.n_loss_tokens > 0
        for sequence in sample.sequences:
            assert 0 < len(sequence) <= MAX_LENGTH
            assert sequence.input_ids.dtype == np.int32
            assert not sequence.loss_mask[0]
            assert 0 <= sequence.input_ids.min() <= sequence.input_ids.max() < len(tokenizer)
            assert sequence.advantage is None or np.isfinite(sequence.advantage)


def test_texts_are_cut_off_from_their_neighbors_in_a_chunk_of_any_size(tokenizer, pool, monkeypatch):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in pool.select(range(20))]
    whole = encode(tokenizer, rows, "response", "truncate-completion")
    monkeypatch.setattr(samples, "CHARACTERS_TOGETHER", 500)
    pieces = encode(tokenizer, rows, "response", "truncate-completion")
    assert [s.sequences[0].input_ids.tolist() for s in whole] == [s.sequences[0].input_ids.tolist() for s in pieces]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [None, "a", "b"], "completion": ["x", None, "y"]},
        {
            "messages": [
                None,
                [{"role": "user", "content": None}],
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            ]
        },
        {
            "prompt": ["a", "b", "c"],
            "completions": [None, ["x", None], ["x", "y"]],
            "advantages": [[1.0], [1.0, None], [1.0, -1.0]],
        },
    ],
)
def test_null_rows_and_nulls_inside_rows_of_an_arrow_table_cost_only_themselves(tokenizer, columns):
    dataset = datasets.Dataset.from_dict(columns)
    layout = recognize(dataset.column_names, ScoreConfig())
    statuses = [s.status for s in encode(tokenizer, layout.rows(dataset), layout.loss, "skip")]
    assert statuses[-1] == "ok"
    assert statuses[1].startswith("error: ")
    if layout.format == "rollouts":
        flat = one_row_per_rollout(dataset, layout)
        single = recognize(flat.column_names, ScoreConfig())
        assert [s.status.split(":")[0] for s in encode(tokenizer, single.rows(flat), single.loss, "skip")] == [
            "error",
            "ok",
            "error",
            "ok",
            "ok",
        ]
