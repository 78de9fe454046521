"""Figures for papers: every format, labels with units on every axis, the same tables the same picture."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib: `pip install 'gradient-selector[plots]'` draws figures")

import matplotlib as mpl
from test_report import evidence, model, report, rows, store  # noqa: F401

from selector.cli import main
from selector.plots import FIGURES, STYLE, save

BEGINNINGS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_every_format_is_written_and_global_state_untouched(report, tmp_path, kind):  # noqa: F811
    before = {key: mpl.rcParams[key] for key in STYLE}
    written = save(report, ("distributions", "spectra"), tmp_path / "figures", kind)
    assert {path.stem for path in written} >= {"distributions_selected", "distributions_sources", "spectra_0"}
    assert all(path.read_bytes().startswith(BEGINNINGS[kind]) for path in written)
    assert {key: mpl.rcParams[key] for key in STYLE} == before


def test_same_tables_give_the_same_file(report, tmp_path):  # noqa: F811
    first, second = (save(report, ("length",), tmp_path / name, "svg")[0].read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_says_what_it_shows_and_in_which_unit(report, name):  # noqa: F811
    with mpl.rc_context(STYLE):
        for figure in FIGURES[name](report).values():
            for axes in figure.axes:
                labels = axes.get_xlabel(), axes.get_ylabel()
                named = [text.get_text() for text in axes.get_yticklabels()]
                assert labels[0] or axes.get_label() == "<colorbar>"
                assert labels[1] or "q" in named


def test_command_explains_what_is_missing(store, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("selector.cli.plot.find_spec", lambda name: None)
    assert main(["plot", str(store.path), "--out", str(tmp_path / "figures")]) == 2
    assert "pip install 'gradient-selector[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
