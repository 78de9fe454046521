"""A selection in the files of other tools, read back by the tool or held against the schema that it documents."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from selector.errors import ConfigError, SelectionError
from selector.export import KINDS, export
from selector.selection import Selection

PICKED = [4, 0, 2]
ASK, TELL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 ✓"}
ROWS = {
    "prompt-completion": {"prompt": "2+2?", "completion": "4 ✓"},
    "conversation": {"prompt": [ASK], "completion": [TELL]},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, ASK, TELL]},
    "instruction": {"instruction": "Add.", "input": "2+2?", "output": "4 ✓"},
    "text": {"text": "2+2 is 4 ✓"},
    "preference": {"prompt": "2+2?", "chosen": "4 ✓", "rejected": "5"},
    "preference-conversation": {"chosen": [ASK, TELL], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
}


def make(format: str) -> tuple[datasets.Dataset, Selection]:
    """Five rows of a format, of which three are picked."""
    dataset = datasets.Dataset.from_list([{**ROWS[format], "source": "sums", "n": i} for i in range(5)])
    return dataset, Selection(
        ids=np.array([f"s{i}" for i in PICKED], dtype=object), rows=np.array(PICKED), weights=np.array([1.0, 2.0, 1.0]),
        scores=np.array([0.5, np.nan, -1.0]), n_tokens=np.array([3, 3, 3]), reasons=np.array(["why"] * 3, dtype=object),
    )  # fmt: skip


def lines(path):
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in path.read_text("utf-8").splitlines()
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_plain_exports_keep_order_content_and_provenance(tmp_path, kind):
    dataset, selection = make("messages")
    (path,) = export(selection, dataset, tmp_path, kind)
    loaded = {
        "jsonl": lines,
        "parquet": lambda p: pq.read_table(p).to_pylist(),
        "datasets": lambda p: datasets.load_from_disk(str(p)).to_list(),
    }[kind](path)
    assert [row["n"] for row in loaded] == PICKED
    assert [row["selector_id"] for row in loaded] == ["s4", "s0", "s2"]
    assert [m["content"] for m in loaded[0]["messages"]] == ["Be brief.", "2+2?", "4 ✓"]
    assert loaded[0]["selector_reason"] == "why"


def test_an_index_list_names_rows(tmp_path):
    dataset, selection = make("text")
    (path,) = export(selection, dataset, tmp_path, "index")
    assert pyarrow.csv.read_csv(path).to_pylist() == [
        {"row": 4, "sample_id": "s4", "score": 0.5, "weight": 1.0},
        {"row": 0, "sample_id": "s0", "score": None, "weight": 2.0},
        {"row": 2, "sample_id": "s2", "score": -1.0, "weight": 1.0},
    ]


@pytest.mark.parametrize("format", ROWS)
def test_trl_recognizes_the_rows(tmp_path, format):
    from trl.data_utils import is_conversational

    dataset, selection = make(format)
    (path,) = export(selection, dataset, tmp_path, "trl")
    row = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))[0]
    expected = {"text": {"text"}, "messages": {"messages"}}.get(
        format, {"prompt", "chosen", "rejected"} if "preference" in format else {"prompt", "completion"}
    )
    assert set(row) - {"selector_id", "selector_score", "selector_weight", "source"} == expected
    assert is_conversational(row) is (format in ("conversation", "messages", "preference-conversation"))


def test_llama_factory_finds_messages_through_dataset_info(tmp_path):
    dataset, selection = make("instruction")
    data, info = export(selection, dataset, tmp_path, "llama-factory")
    entry = json.loads(info.read_text())["selected"]
    assert info.name == "dataset_info.json"
    assert (tmp_path / entry["file_name"]) == data
    assert entry["formatting"] == "sharegpt"
    tags, messages = entry["tags"], lines(data)[0][entry["columns"]["messages"]]
    assert [m[tags["role_tag"]] for m in messages] == [tags["user_tag"], tags["assistant_tag"]]
    assert [m[tags["content_tag"]] for m in messages] == ["Add.\n2+2?", "4 ✓"]
    assert (
        tags["observation_tag"] == "tool"
    )  # a tool's answer takes the place of a user's turn; unnamed, the row is dropped


def test_llama_factory_ranks_pairs_and_reads_text(tmp_path):
    for format in ("preference", "preference-conversation"):
        data, info = export(*make(format)[::-1], tmp_path / format, "llama-factory")
        entry, row = json.loads(info.read_text())["selected"], lines(data)[0]
        assert entry["ranking"] is True
        assert [row[entry["columns"][role]] for role in ("messages", "chosen")] == [[ASK], TELL]
        assert row[entry["columns"]["rejected"]]["content"] == "5"
    data, info = export(*make("text")[::-1], tmp_path / "text", "llama-factory")
    assert lines(data)[0][json.loads(info.read_text())["selected"]["columns"]["prompt"]] == "2+2 is 4 ✓"


@pytest.mark.parametrize(
    ("format", "type"),
    [
        ("messages", "chat_template"),
        ("prompt-completion", "chat_template"),
        ("text", "completion"),
        ("preference", "chat_template.default"),
    ],
)
def test_axolotl_settings_name_the_fields(tmp_path, format, type):
    data, settings = export(*make(format)[::-1], tmp_path, "axolotl")
    loaded = yaml.safe_load(settings.read_text())
    (entry,) = loaded["datasets"]
    assert entry["type"] == type
    assert entry["path"] == data.name
    assert loaded.get("rl") == ("dpo" if format == "preference" else None)
    row = lines(data)[0]
    for setting in ("field", "field_messages", "field_chosen", "field_rejected"):
        assert setting not in entry or entry[setting] in row


@pytest.mark.parametrize("format", ROWS)
def test_ms_swift_rows_are_messages(tmp_path, format):
    (data,) = export(*make(format)[::-1], tmp_path, "ms-swift")
    row = lines(data)[0]
    assert all(set(m) == {"role", "content"} for m in row["messages"])
    assert row["messages"][-1]["role"] == "assistant"
    assert ("rejected_messages" in row) is ("preference" in format)
    if "preference" in format:
        assert row["messages"][:-1] == row["rejected_messages"][:-1]


@pytest.mark.parametrize("format", ["prompt-completion", "conversation", "messages", "instruction"])
def test_verl_rows_serve_both_trainers(tmp_path, format):
    (data,) = export(*make(format)[::-1], tmp_path, "verl")
    row = pq.read_table(data).to_pylist()[0]
    assert row["data_source"] == "sums"
    assert row["prompt"] == row["messages"][:-1]
    assert row["messages"][-1] == TELL
    assert row["reward_model"] == {"style": "rule", "ground_truth": "4 ✓"}
    assert row["extra_info"]["selector_id"] == "s4"


def test_nothing_is_left_behind_when_an_export_fails(tmp_path):
    dataset, selection = make("prompt-completion")
    broken = datasets.Dataset.from_list([{"prompt": "2+2?", "completion": None if i == 2 else "4"} for i in range(5)])
    with pytest.raises(ValueError, match="completion"):
        export(selection, broken, tmp_path, "ms-swift")
    assert list(tmp_path.iterdir()) == []
    export(selection, dataset, tmp_path, "datasets")
    export(selection, dataset, tmp_path, "datasets")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    dataset, selection = make("text")
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        export(selection, dataset, tmp_path, "parket")
    with pytest.raises(SelectionError, match="cannot be exported for verl"):
        export(selection, dataset, tmp_path, "verl")
    with pytest.raises(SelectionError, match="not in the data set"):
        export(selection, dataset.select(range(2)), tmp_path, "jsonl")
    assert len(KINDS) == 9
