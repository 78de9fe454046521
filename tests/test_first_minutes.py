"""What a newcomer meets first: the overview, errors that say what to type next, completion, and the doctor."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest

from selector.cli import COMMANDS, main, what_next
from selector.cli.doctor import Machine, diagnose
from selector.errors import ConfigError

SOUND = Machine(
    versions={"torch": "2.13.0", "transformers": "5.23.0", "faiss-cpu": "1.15.1", "triton": "3.6.0"}, cuda="13.0", architectures=("sm_80", "sm_90"),
    gpus={"0: NVIDIA H200": "sm_90"}, has_nvidia_driver=True, extras=frozenset({"faiss", "trl", "matplotlib"}),
)  # fmt: skip
NEEDS = ["torch>=2.6", "transformers>=4.57", 'faiss-cpu>=1.9; extra == "faiss-cpu"']


def test_program_without_words_shows_five_commands_that_exist(capsys):
    assert main([]) == 0
    shown = re.findall(r"^  selector (\w+)", capsys.readouterr().out, flags=re.M)
    assert len(shown) == 5
    assert set(shown) <= {command.name for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_every_command_shows_an_example_of_it(command):
    assert f"Example: selector {command.name}" in str(command.__doc__)


def test_every_error_ends_with_what_to_type(tmp_path, capsys):
    assert main(["select", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.rstrip().endswith("make one with `selector score`")
    assert main(["search", str(tmp_path / "index"), "--ids", "x"]) == 2
    assert "selector " in capsys.readouterr().err.splitlines()[-1]
    assert what_next("score", ConfigError("wrong", fix="raise it")) == "  next:    selector score --help"
    assert what_next("score", ConfigError("wrong")) == "  next:    selector score --help"
    assert what_next("plot", ConfigError("no matplotlib", fix="pip install 'gradient-selector[plots]'")) == ""


def test_shell_completion_is_a_script_that_bash_reads(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", "bash"])
    assert ended.value.code in (0, None)
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", script], check=True)
    assert "doctor" in script.read_text()


def test_sound_machine_has_nothing_to_hear():
    assert diagnose(SOUND, NEEDS) == []


@pytest.mark.parametrize(
    ("change", "problem", "words"),
    [
        ({"versions": SOUND.versions | {"torch": "2.5.1"}}, True, "torch 2.5.1 is out of range"),
        ({"versions": SOUND.versions | {"faiss-gpu": "1.15.1"}}, True, "overwrite each other's files"),
        ({"cuda": None, "gpus": {}, "architectures": ()}, True, "this torch is a CPU build"),
        ({"gpus": {}}, True, "reaches no GPU"),
        ({"gpus": {"0: old": "sm_70"}}, True, "0: old is sm_70"),
        ({"versions": {"torch": "2.13.0"}}, False, "without Triton"),
        ({"versions": SOUND.versions | {"liger-kernel": "0.6.0"}}, False, "fused loss"),
        ({"extras": frozenset({"faiss", "trl"})}, False, "needed for `selector plot`"),
    ],
)
def test_known_bad_combinations_are_named_with_a_way_out(change, problem, words):
    (remark,) = diagnose(dataclasses.replace(SOUND, **change), NEEDS)
    assert remark.problem is problem
    assert words in remark.text
    assert remark.fix


def test_a_later_gpu_of_the_same_major_version_runs_what_was_built_for_an_earlier_one():
    assert diagnose(dataclasses.replace(SOUND, gpus={"0: RTX 3090": "sm_86"}), NEEDS) == []


def test_doctor_looks_at_this_machine(capsys):
    assert main(["doctor"]) in (0, 1)
    shown = capsys.readouterr().out
    for word in ("python", "torch", "FAISS searches on", "problems", "--tyro-print-completion"):
        assert word in shown
