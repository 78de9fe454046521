"""From scores to a selection, and its random control."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from exact_neighbours import ExactNeighbours
from test_scores import make_store

from selector.errors import ConfigError, GradientIndexError, SelectionError
from selector.index import GradientIndex
from selector.scores import Aggregation, score, write_scores
from selector.selecting import compare, matched_random, select
from selector.selecting.run import VectorIndex
from selector.selecting.shortlist import within_reach
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


def test_a_store_is_scored_and_selected_from_in_one_call(tmp_path):
    store, _ = make_store(tmp_path / "features", n=60, failed={3})
    selection = select(store, "nuclear_norm", 10, control="none", aggregation=Aggregation(last=1))
    expected = select(score(store, "nuclear_norm", control="none", aggregation=Aggregation(last=1)), budget=10)
    assert selection.ids.tolist() == expected.ids.tolist()
    assert selection.provenance["scores"]["store"] == store.manifest.fingerprint
    assert (np.diff(selection.scores) <= 0).all()


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


class Index:
    """An index over some samples, in an order of its own, whose space is rotated against that of the vectors."""

    def __init__(self, ids, vectors):
        self.order = np.random.default_rng(7).permutation(len(ids))
        self.ids = ids[self.order]
        self.turn = np.linalg.qr(np.random.default_rng(8).normal(size=(vectors.shape[1],) * 2))[0]
        self.vectors = (vectors[self.order] @ self.turn).astype(np.float32)
        self._exact = ExactNeighbours(self.vectors)

    def positions(self, ids):
        place = {sample_id: i for i, sample_id in enumerate(self.ids)}
        return np.array([place[sample_id] for sample_id in ids], dtype=np.int64)

    def project(self, vectors):
        return (vectors @ self.turn).astype(np.float32)

    def __len__(self):
        return len(self.ids)

    def neighbours(self, positions, k):
        return self._exact.neighbours(positions, k)

    def neighbours_of(self, vectors, k):
        return self._exact.neighbours_of(self.project(vectors), k)

    def graph(self, k):
        return self._exact.graph(k)

    def duplicates(self, threshold):
        return self._exact.duplicates(threshold)


@pytest.fixture
def indexed():
    scores = make_pool(80, missing=0.2)
    vectors = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    return scores, vectors, Index(scores.ids, vectors)


@pytest.mark.parametrize(
    ("policy", "options"), [("facility-location", {"k": 5}), ("k-center", {}), ("match-target", {}), ("mutual-knn", {})]
)
def test_an_index_serves_the_policies_whatever_its_order(indexed, policy, options):
    scores, vectors, index = indexed
    target = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    first = select(scores, budget=10, policy=policy, index=index, target=target, **options)
    again = select(
        scores, budget=10, policy=policy, index=Index(scores.ids[::-1], vectors[::-1]), target=target, **options
    )
    assert len(first) == 10
    assert set(first.ids) == set(again.ids)


def test_a_gradient_index_is_what_policies_ask_for(indexed):
    scores, vectors, _ = indexed
    index = GradientIndex.from_vectors(scores.ids, vectors)
    assert isinstance(index, VectorIndex)
    plain = Index(scores.ids, vectors)
    for policy, options in {
        "facility-location": {"k": 5},
        "k-center": {},
        "match-target": {},
        "deduplicate": {"threshold": 0.9},
    }.items():
        target = vectors[:2]
        ours = select(scores, budget=10, policy=policy, index=index, target=target, **options)
        if policy != "k-center":  # the index compares directions, the plain one lengths too
            assert (
                ours.ids.tolist()
                == select(scores, budget=10, policy=policy, index=plain, target=target, **options).ids.tolist()
            )


def test_targets_by_id_are_matched_and_not_picked(indexed):
    scores, vectors, index = indexed
    target = scores.ids[np.isfinite(scores.values)][:2].tolist()
    by_index = select(scores, budget=6, policy="match-target", index=index, target=target)
    by_vectors = select(scores, budget=6, policy="match-target", vectors=vectors, target=target)
    assert by_index.ids.tolist() == by_vectors.ids.tolist()
    assert not set(target) & set(by_index.ids)
    assert by_index.provenance["target"] == target


def test_samples_that_the_index_does_not_hold_are_named(indexed):
    scores, vectors, _ = indexed
    with pytest.raises(GradientIndexError, match="not in the index"):
        select(scores, budget=6, policy="k-center", index=GradientIndex.from_vectors(scores.ids[:40], vectors[:40]))
    with pytest.raises(SelectionError, match="needs vectors"):
        select(scores, budget=6, policy="match-target", target=scores.ids[:1].tolist())
    with pytest.raises(SelectionError, match="do not fit"):
        select(scores, budget=6, policy="k-center", vectors=vectors[:5])


BUDGETS = ("0", "10%", "20% tokens", "5 tokens", "100%")
QUEUES = (
    ("top", {}), ("proportional", {}), ("quota", {}), ("quota", {"shares": "proportional"}),
    ("quota", {"shares": {"math": 5, "code": 0.1}}), ("quota", {"shares": {"chat": 1, "code": 0}}),
)  # fmt: skip


@pytest.mark.parametrize(("policy", "options"), QUEUES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_shortlist_changes_no_pick(tmp_path, monkeypatch, policy, options, ties, sampled):
    if sampled:
        monkeypatch.setattr("selector.selecting.shortlist.FLOOR_FROM", 100)
        monkeypatch.setattr("selector.selecting.shortlist.STRIDE", 13)
    scores = make_pool(1000, ties=ties, missing=0.1)
    write_scores(tmp_path / "scores.parquet", {"mine": scores})
    for budget in BUDGETS:
        short = select(tmp_path / "scores.parquet", "mine", budget, policy, **options)
        whole = select(scores, budget=budget, policy=policy, **options)
        assert short.ids.tolist() == whole.ids.tolist(), budget
        assert short.provenance["sources"] == whole.provenance["sources"]
        assert short.provenance["removed"] == whole.provenance["removed"]


def test_a_shortlist_is_short():
    rng = np.random.default_rng(0)
    values, groups, costs = rng.normal(size=10_000), rng.integers(0, 3, 10_000), rng.integers(1, 50, 10_000)
    reached = within_reach(values, groups, np.ones(3), costs, int(0.1 * costs.sum()))
    assert 0.1 * costs.sum() <= costs[reached].sum() < 0.12 * costs.sum()


def test_comparison_with_itself_and_with_chance():
    scores = make_pool(2000)
    top, random = select(scores, budget="10%"), select(scores, budget="10%", policy="random")
    same = compare(top, top, scores)
    assert (same.shared, same.jaccard, same.length_shift, same.source_shift) == (200, 1.0, 0.5, 0.0)
    assert same.expected_jaccard == pytest.approx(20 / 380)
    other = compare(top, random, scores)
    assert other.jaccard == pytest.approx(other.expected_jaccard, abs=0.04)
    assert other.first.samples == 200
    assert sum(other.first.sources.values()) == pytest.approx(1)


def test_comparison_sees_length_source_and_coverage():
    scores = make_pool(300)
    long, short = (select(replace(scores, values=sign * scores.n_tokens.astype(float)), budget=30) for sign in (1, -1))
    assert compare(short, long, scores).length_shift == 1.0
    assert compare(long, short, scores).length_shift == 0.0
    math = select(replace(scores, values=(scores.source == "math").astype(float)), budget=30)
    code = select(replace(scores, values=(scores.source == "code").astype(float)), budget=30)
    assert compare(math, code, scores).source_shift == 1.0
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    spread = select(scores, budget=30, policy="facility-location", index=Index(scores.ids, vectors), k=8)
    coverage = compare(math, spread, scores, neighbours=ExactNeighbours(vectors)).coverage
    assert coverage is not None
    assert coverage[0] < coverage[1] < 1


def test_a_selection_from_another_pool_cannot_be_compared():
    with pytest.raises(SelectionError, match="not in the pool"):
        compare(select(make_pool(30), budget=3), select(make_pool(30), budget=3), make_pool(1))
