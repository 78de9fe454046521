"""Every recipe is complete: it says what it needs, its settings are read, and its commands run, on the embedded model."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from selector.assets import HERE, POOL, TINY_MODEL
from selector.cli import main
from selector.selection import Selection

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.sh"))
OWN_PYTHON = ["reproduce_paper.py", "target_matched.py"]
SMALL = ["--limit", "12", "--layers", "0", "--projections", "q", "o", "--id-column", "id"]

LOGGED = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if os.path.basename(sys.argv[0]) == "scontrol":
    print("node0")
"""
"""Stands in for the programs that a script starts and notes how they are called."""


def calls(script: Path, folder: Path, arguments: list[str], **environment: str) -> list[list[str]]:
    """Run a script with every program noted in place of started; words of each call."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("selector", "accelerate", "srun", "scontrol"):
        (programs / name).write_text(LOGGED.format(python=sys.executable))
        (programs / name).chmod(0o755)
    log = folder / "calls.jsonl"
    known = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(log),
        "ASSETS": str(HERE),
        "MODEL": str(TINY_MODEL),
        "DATA": str(POOL),
    }
    subprocess.run(["bash", script, *arguments], env=os.environ | known | environment, check=True, capture_output=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def of_selector(call: list[str]) -> list[str]:
    """The words behind `selector`, however it is launched."""
    return call[1:] if call[0] == "selector" else call[call.index("selector") + 1 :]


def run_all(found: list[list[str]]) -> None:
    for call in found:
        if call[0] != "scontrol":
            assert main(of_selector(call)) == 0


@pytest.mark.parametrize("path", [*SCRIPTS, *(RECIPES / name for name in OWN_PYTHON)], ids=lambda path: path.name)
def test_header_says_hardware_time_and_memory_and_how_they_are_known(path):
    text = path.read_text(encoding="utf-8")
    for what in ("Hardware", "Time", "Memory"):
        (line,) = re.findall(rf"^#? ?{what}: +(.+)$", text, flags=re.M)
        assert what == "Hardware" or re.search("measured|estimated", line)


@pytest.mark.parametrize(
    "script",
    [s for s in SCRIPTS if s.stem not in ("export_frameworks", "qwen1.5b_sft_top_slurm_array")],
    ids=lambda s: s.name,
)
def test_script_scores_selects_and_shows(script, tmp_path):
    cluster = {
        "SLURM_JOB_NODELIST": "node[0-3]",
        "SLURM_NNODES": "4",
        "SLURM_JOB_ID": "7",
        "NODE": "0",
        "ADDRESS": "node0",
    }
    found = calls(script, tmp_path, SMALL, OUT=str(tmp_path / "out"), **cluster)
    for call in found:
        if call[0] == "accelerate":
            load_config_from_file(call[call.index("--config_file") + 1])
        if call[0] == "srun":
            assert call[1] == "torchrun"
    run_all(found)
    assert len(Selection.load(tmp_path / "out" / "selection" / "selection.parquet")) > 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000


def test_array_task_scores_its_own_file(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    lines = POOL.read_text(encoding="utf-8").splitlines()
    for i in range(3):
        (parts / f"{i:02}.jsonl").write_text("\n".join(lines[10 * i : 10 * i + 10]), encoding="utf-8")
    script = RECIPES / "qwen1.5b_sft_top_slurm_array.sh"
    found = calls(
        script,
        tmp_path,
        [str(parts), "--layers", "0", "--projections", "q"],
        OUT=str(tmp_path / "out"),
        SLURM_ARRAY_TASK_ID="1",
    )
    run_all(found)
    (row,) = (tmp_path / "out" / "01" / "subset" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["id"] in {json.loads(line)["id"] for line in lines[10:20]}


def test_exports_for_every_framework(tmp_path, pool):
    assert (
        main(["score", "--model", str(TINY_MODEL), "--data", str(POOL), "--out", str(tmp_path / "features"), *SMALL])
        == 0
    )
    assert main(["select", str(tmp_path / "features"), "--out", str(tmp_path / "selection"), "--budget", "5"]) == 0
    run_all(
        calls(
            RECIPES / "export_frameworks.sh",
            tmp_path,
            [str(tmp_path / "selection"), "--id-column", "id"],
            OUT=str(tmp_path / "out"),
        )
    )
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files >= {
        "llama-factory/dataset_info.json",
        "axolotl/axolotl.yaml",
        "ms-swift/data.jsonl",
        "verl/data.parquet",
    }


def run_python(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(RECIPES / name), run_name="__main__")


def test_target_matched_selects_by_sketches(tmp_path, monkeypatch, capsys):
    run_python("target_matched.py", monkeypatch, "--limit", 16, "--budget", 4, "--output", tmp_path)
    selection = Selection.load(tmp_path / "selection.parquet")
    assert len(selection) == 4
    assert selection.provenance["policy"] == "match-target"
    assert "for target" in selection.reasons[0]
    command = capsys.readouterr().out.split("look at them: selector ")[1].split()
    assert main([*command, "--out", str(tmp_path / "report.html")]) == 0


def test_paper_recipe_prints_its_tables(tmp_path, monkeypatch, capsys):
    run_python(
        "reproduce_paper.py",
        monkeypatch,
        "--models",
        TINY_MODEL,
        "--pools",
        POOL,
        "--rows",
        16,
        "--each",
        4,
        "--output",
        tmp_path,
    )
    shown = capsys.readouterr().out
    assert "4 highest against 4 lowest" in shown
    assert "response length alone: AUC" in shown
    assert len(re.findall(r"AUC \d\.\d+ raw, \d\.\d+ with length controlled", shown)) == 2
    assert len(re.findall(r"^    [qkvo]  high ", shown, flags=re.M)) == 8


def test_list_of_recipes_is_whole():
    listed = set(re.findall(r"`([\w.-]+\.(?:sh|py|yaml))`", (RECIPES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in RECIPES.iterdir() if path.suffix in (".sh", ".py", ".yaml")}
