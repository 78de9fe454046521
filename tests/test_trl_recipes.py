"""The training recipes run from their one line, on a tiny model and a few of the embedded rows."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import trainer_cases as cases

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:This trainer will soon be moved:UserWarning"),
]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        pytest.param("sft_selected.py", ["--budget", "50%"], marks=pytest.mark.slow),
        ("sft_selected.py", ["--budget", "50%", "--online", "refresh"]),
        ("dpo_selected.py", []),
        pytest.param("grpo_adaptive.py", [], marks=pytest.mark.slow),
        pytest.param("grpo_adaptive.py", ["--live"], marks=pytest.mark.slow),
    ],
)
def test_a_training_recipe_runs(
    recipe: str, options: list[str], tmp_path: Path, pool: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = cases.AutoTokenizer.from_pretrained(cases.TINY_MODEL)
    for part in (cases.model(tokenizer, max_position_embeddings=1024), tokenizer):
        part.save_pretrained(tmp_path / "model")
    shortest = sorted(pool, key=lambda row: len(row["prompt"]) + len(row["completion"]))
    rows = [row for row in shortest if "gsm8k" in row["source"]][:8] + shortest[:8]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, {row["id"]: row for row in rows}.values())))
    out = tmp_path / "out"
    words = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--output",
        str(out),
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [recipe, *words, *options])
    runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (out / "checkpoint-2" / "selector_sampler.safetensors").exists()
    if recipe == "grpo_adaptive.py":
        demonstrations = [json.loads(line) for line in (out / "demonstrations.jsonl").read_text().splitlines()]
        assert {"prompt", "completion"} <= set(demonstrations[0]), "a random model solves nothing"
