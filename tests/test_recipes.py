"""Recipes run: each on something tiny, as its header says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selector.scorer import load_model

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def test_base_model_can_be_trained_from_a_text_file(tmp_path, pool):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\x1e".join(row["prompt"] + row["completion"] for row in pool) * 3, encoding="utf-8")
    small = {
        "vocabulary": 400,
        "hidden": 16,
        "layers": 1,
        "heads": 2,
        "kv-heads": 1,
        "intermediate": 32,
        "length": 32,
        "batch": 4,
    }
    shape = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "model"
    command = [
        sys.executable,
        RECIPES / "train_base_model.py",
        "--corpus",
        corpus,
        "--out",
        out,
        "--seconds",
        "3",
        *shape,
    ]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] > 0
    assert 0 < record["validation_loss"] < 6.1  # below the logarithm of the vocabulary: it has learnt something
    model, tokenizer = load_model(str(out))
    assert model.config.hidden_size == 16
    assert tokenizer.decode(tokenizer("naïve 1/2 ½")["input_ids"]) == "naïve 1/2 ½"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_base_model_keeps_tokens_and_refuses_those_of_another_corpus(tmp_path, pool, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_base_model", RECIPES / "train_base_model.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_base_model", recipe)  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    corpus = tmp_path / "corpus.txt"
    texts = [row["prompt"] + row["completion"] for row in pool]
    corpus.write_text("\x1e".join(texts), encoding="utf-8")
    settings = recipe.Settings(corpus=corpus, out=tmp_path / "model", tokens=tmp_path / "tokens", vocabulary=400)
    tokenizer, train, held_out = recipe.prepare(settings)
    documents = [tokenizer.decode(ids) for ids in np.split(train, np.flatnonzero(train == tokenizer.eos_token_id) + 1)]
    assert documents[:-1] == [text + tokenizer.eos_token for text in texts[: -(len(texts) // 100)]]
    kept, *again = recipe.prepare(settings)
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert all(np.array_equal(a, b) for a, b in zip(again, (train, held_out), strict=True))
    corpus.write_text("another corpus", encoding="utf-8")
    with pytest.raises(SystemExit, match="name another folder"):
        recipe.prepare(settings)
