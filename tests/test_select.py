"""From scores to a selection, and its random control."""

from __future__ import annotations

import numpy as np
import pytest

from selector.errors import ConfigError, SelectionError
from selector.scores import write_scores
from selector.selecting import matched_random, select
from selector.selection import Selection
from selector.testing import make_pool, shuffled


def test_a_selection_carries_what_made_it(tmp_path):
    scores = make_pool(300, missing=0.1)
    selection = select(scores, budget="20%", policy="band", low=0.2)
    assert selection.provenance["policy"] == "band"
    assert selection.provenance["options"] == {"low": 0.2}
    assert selection.provenance["budget"] == "20% of the samples"
    assert selection.provenance["removed"]["no score"] == np.isnan(scores.values).sum()
    sources = selection.provenance["sources"]
    assert sum(counts["samples"] for counts in sources.values()) == 300
    assert sum(counts["picked_tokens"] for counts in sources.values()) == selection.n_tokens.sum()
    selection.save(tmp_path / "selection.parquet")
    assert Selection.load(tmp_path / "selection.parquet").provenance == selection.provenance


def test_rows_and_ids_belong_together():
    scores = shuffled(make_pool(100), np.random.default_rng(0).permutation(100))
    selection = select(scores, budget=10)
    row_of = dict(zip(scores.ids, scores.rows, strict=True))
    assert [row_of[i] for i in selection.ids] == selection.rows.tolist()


def test_a_table_of_scores_gives_the_same_selection(tmp_path):
    scores = make_pool(300, ties=True, missing=0.2)
    write_scores(tmp_path / "scores.parquet", {"mine": scores})
    from_table = select(tmp_path / "scores.parquet", "mine", "4k tokens")
    assert from_table.ids.tolist() == select(scores, budget="4k tokens").ids.tolist()


@pytest.mark.parametrize("policy", ["top", "bottom", "random"])
def test_matched_random_has_the_tokens_and_lengths_of_the_selection(policy):
    scores = make_pool(4000)
    scores.values[:] += 0.5 * np.log(scores.n_tokens)
    selection = select(scores, budget="20% tokens", policy=policy)
    control = matched_random(selection, scores, seed=1)
    assert control.n_tokens.sum() <= selection.n_tokens.sum()
    assert control.n_tokens.sum() > selection.n_tokens.sum() - scores.n_tokens.max()
    assert len(control) == pytest.approx(len(selection), rel=0.02)
    deciles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        np.quantile(control.n_tokens, deciles), np.quantile(selection.n_tokens, deciles), rtol=0.06
    )
    assert len(np.intersect1d(control.ids, selection.ids)) < 0.8 * len(selection)


def test_matched_random_does_not_depend_on_the_order_of_the_pool():
    scores = make_pool(300)
    selection = select(scores, budget=50)
    other = shuffled(scores, np.random.default_rng(0).permutation(300))
    assert matched_random(selection, scores).ids.tolist() == matched_random(selection, other).ids.tolist()


def test_what_cannot_be_selected_is_refused(tmp_path):
    with pytest.raises(SelectionError, match="no sample has a score"):
        select(make_pool(5, missing=1.0))
    with pytest.raises(ConfigError, match="budget cannot be read"):
        select(make_pool(5), budget="much")
    with pytest.raises(SelectionError, match="no table of scores"):
        select(tmp_path / "nothing.parquet")
