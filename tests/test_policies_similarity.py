"""Policies about similarity against plain references: coverage, diversity, targets, matching, filters."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from exact_neighbours import ExactNeighbours
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import ConfigError, SelectionError
from selector.policies import POLICIES, Budget, MemberNeighbours, Pool, run_policy
from selector.policies.clusters import k_means
from selector.policies.filters import agreement, mahalanobis_distance, mutual_neighbours
from selector.policies.matching import matching_pursuit, non_negative_ridge
from selector.policies.target import subspace_share, target_ranks
from selector.testing import check_policy, make_pool


def vector_of(sample_id: str) -> np.ndarray:
    number = int(sample_id.split("-")[1])
    center = np.random.default_rng(number % 5).normal(size=6)
    return 2 * center + np.random.default_rng(1000 + number).normal(size=6)


def attach(pool: Pool, positions: np.ndarray) -> Pool:
    """Clustered vectors that depend on the ids alone."""
    vectors = np.array([vector_of(i) for i in pool.ids], dtype=np.float32).reshape(len(pool), 6)
    target = np.random.default_rng(9).normal(size=(3, 6)).astype(np.float32)
    return replace(pool, vectors=vectors, neighbours=ExactNeighbours(vectors), target=target)


def pool_of(n: int, **kwargs) -> Pool:
    scores = make_pool(n, **kwargs)
    order = np.argsort(scores.ids)
    return attach(
        Pool(*(column[order] for column in (scores.ids, scores.values, scores.n_tokens, scores.source))), order
    )


def pick(name: str, pool: Pool, budget: Budget | int, **options):
    return POLICIES[name](pool, budget if isinstance(budget, Budget) else Budget(budget), seed=0, **options)


EXACT = {
    "k-center": {},
    "facility-location": {"k": 8},
    "coding-rate": {},
    "mmr": {},
    "match-target": {},
    "target-subspace": {"rank": 2},
    "cluster-quota": {"clusters": 4},
    "quota": {"within": "facility-location", "options": {"k": 4}},
    "union": {"branches": [{"policy": "top", "weight": 2}, {"policy": "k-center"}]},
}
FILTERS = {
    "deduplicate": {"threshold": 0.97},
    "mutual-knn": {"k": 4, "spread": True},
    "mahalanobis": {"drop": 0.1},
    "opposing-signals": {},
    "source-agreement": {},
    "gradient-matching": {"mode": "source"},
    "then": {"stages": [{"policy": "deduplicate"}, {"policy": "mmr"}]},
}


@pytest.mark.parametrize("name", EXACT)
def test_policy_fills_the_budget_and_keeps_the_contract(name):
    check_policy(name, attach=attach, **EXACT[name])


@pytest.mark.parametrize("name", FILTERS)
def test_filter_keeps_the_contract(name):
    check_policy(name, attach=attach, exact=False, **FILTERS[name])


def test_every_policy_is_held_to_the_contract():
    elsewhere = {"top", "bottom", "random", "band", "threshold", "proportional"}
    assert set(POLICIES) == elsewhere | set(EXACT) | set(FILTERS)


@pytest.mark.parametrize("name", ["k-center", "facility-location", "match-target"])
def test_a_policy_about_similarity_says_what_it_needs(name):
    with pytest.raises(SelectionError, match=r"needs (vectors|neighbours|target)"):
        run_policy(name, make_pool(5), Budget(2), seed=0)


def coverage(similarity, picked):
    """Sum over samples of the similarity to the nearest picked one, over all pairs."""
    return similarity[:, picked].max(axis=1).sum()


def plain_greedy(n, gain, k):
    picked = []
    for _ in range(k):
        gains = [gain([*picked, j]) if j not in picked else -np.inf for j in range(n)]
        picked.append(int(np.argmax(np.round(gains, 9))))
    return picked


def test_facility_location_on_a_complete_graph_is_exact_greedy():
    pool = pool_of(40)
    similarity = pool.neighbours.similarity().astype(np.float64)
    np.fill_diagonal(similarity, 1.0)
    picked = pick("facility-location", pool, 12, k=39).positions
    assert picked.tolist() == plain_greedy(40, lambda s: coverage(similarity, s), 12)


def test_facility_location_agrees_with_apricot():
    apricot = pytest.importorskip("apricot")
    pool = pool_of(60)
    similarity = np.maximum(pool.neighbours.similarity().astype(np.float64), -1) + 1
    theirs = apricot.FacilityLocationSelection(10, metric="precomputed", optimizer="lazy").fit(similarity).ranking
    ours = pick("facility-location", pool, 10, k=59).positions
    assert coverage(similarity, ours) == pytest.approx(coverage(similarity, theirs), rel=1e-6)


def test_facility_location_on_a_sparse_graph_is_nearly_as_good():
    pool = pool_of(600)
    similarity = pool.neighbours.similarity().astype(np.float64)
    exact = coverage(similarity, pick("facility-location", pool, 60, k=599).positions)
    assert coverage(similarity, pick("facility-location", pool, 60, k=64).positions) >= 0.99 * exact


def test_quality_moves_facility_location_to_better_scores():
    pool = pool_of(200)
    plain, better = (pick("facility-location", pool, 30, k=8, quality=q).positions for q in (0.0, 5.0))
    assert pool.values[better].mean() > pool.values[plain].mean() + 0.5


def test_k_center_is_within_twice_the_best_radius():
    pool = pool_of(14)
    distance = np.linalg.norm(pool.vectors[:, None] - pool.vectors[None], axis=2)
    radius = lambda s: distance[:, list(s)].min(axis=1).max()  # noqa: E731
    best = min(radius(s) for s in combinations(range(14), 4))
    assert radius(pick("k-center", pool, 4).positions) <= 2 * best


def test_coding_rate_is_greedy_log_determinant():
    pool = pool_of(30)
    pool = replace(pool, values=-np.arange(30.0))
    z = pool.vectors / np.linalg.norm(pool.vectors, axis=1, keepdims=True)
    volume = lambda s: np.linalg.slogdet(np.eye(6) + z[s].T @ z[s] / 0.25)[1]  # noqa: E731
    assert pick("coding-rate", pool, 10).positions.tolist() == plain_greedy(30, volume, 10)


def test_mmr_between_score_and_novelty():
    pool = pool_of(80)
    assert pick("mmr", pool, 20, trade=1.0).positions.tolist() == pick("top", pool, 20).positions.tolist()
    z = pool.neighbours.unit
    nearest = lambda s: np.sort(z[s] @ z[s].T, axis=1)[:, -2].mean()  # noqa: E731
    assert nearest(pick("mmr", pool, 20, trade=0.1).positions) < nearest(pick("top", pool, 20).positions)


def test_quota_gives_each_source_its_share():
    pool = pool_of(300)
    picks = pick("quota", pool, 60, shares={"code": 3, "math": 1})
    counts = dict(zip(*np.unique(pool.source[picks.positions].astype(str), return_counts=True), strict=True))
    assert counts == {"code": 45, "math": 15}
    assert picks.removed == {"no quota": int((pool.source == "chat").sum())}


def test_every_beginning_of_a_quota_holds_the_shares():
    pool = pool_of(300)
    sources = pool.source[pick("quota", pool, 90).positions]
    for k in range(1, 91):
        assert all(abs((sources[:k] == name).sum() - k / 3) <= 1 for name in ("chat", "code", "math"))


def test_a_source_that_runs_out_leaves_its_budget_to_the_others():
    pool = replace(pool_of(60), source=np.array(["rare"] * 4 + ["common"] * 56, dtype=object))
    picked = pool.source[pick("quota", pool, 30).positions]
    assert (picked == "rare").sum() == 4
    assert len(picked) == 30


def test_proportional_keeps_the_mixture_in_tokens():
    pool = pool_of(600)
    total = pool.n_tokens.sum()
    picked = pick("proportional", pool, Budget(int(total * 0.4), "tokens")).positions
    for name in ("chat", "code", "math"):
        wanted = 0.4 * pool.n_tokens[pool.source == name].sum()
        assert abs(pool.n_tokens[picked][pool.source[picked] == name].sum() - wanted) <= pool.n_tokens.max()


def test_cluster_quota_balances_uneven_clusters():
    pool = pool_of(200)
    vectors = np.zeros((200, 2), dtype=np.float32)
    vectors[:20, 0], vectors[20:, 1] = 10, 10
    pool = replace(pool, vectors=vectors, target=None)
    picked = pick("cluster-quota", pool, 40, clusters=2).positions
    assert (picked < 20).sum() == 20
    assert (pick("cluster-quota", pool, 40, clusters=2, balance=0.0).positions < 20).sum() == 4


def test_k_means_recovers_separated_clusters():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    labels = k_means((np.eye(3)[truth] * 50 + rng.normal(size=(300, 3))).astype(np.float32), 12, seed=1)
    for cluster in np.unique(labels):
        assert len(np.unique(truth[labels == cluster])) == 1


def test_target_ranks_weigh_targets_alike():
    vectors, target = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]), np.array([[2.0, 0], [0, 0.1]])
    assert target_ranks(vectors, target).tolist() == [[0, 2], [1, 1], [2, 0], [3, 3]]


def test_match_target_covers_every_target():
    pool = pool_of(100)
    best = pick("match-target", pool, 3).positions
    cosines = pool.neighbours.unit @ (pool.target / np.linalg.norm(pool.target, axis=1, keepdims=True)).T
    assert set(cosines.argmax(axis=0).tolist()) <= set(best.tolist())


def test_subspace_share_is_the_length_of_the_projection():
    target = np.array([[1.0, 0, 0], [1, 1, 0]])
    vectors = np.array([[3.0, 4, 0], [0, 0, 2], [1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(subspace_share(vectors, target, 5), [1, 0, np.sqrt(0.5), 0], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 10), st.sampled_from([0.0, 0.3]), st.integers(0, 10**6))
def test_non_negative_ridge_meets_its_optimality_conditions(k, d, penalty, seed):
    rng = np.random.default_rng(seed)
    vectors, wanted = rng.normal(size=(k, d)), rng.normal(size=d)
    weights = non_negative_ridge(vectors, wanted, penalty)
    slope = vectors @ (wanted - weights @ vectors) - penalty * weights
    assert (weights >= 0).all()
    assert (slope <= 1e-6).all()
    np.testing.assert_allclose(slope[weights > 0], 0, atol=1e-6)


def test_matching_pursuit_recovers_a_sparse_combination():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 60))
    wanted = 2 * vectors[3] + vectors[17] + 3 * vectors[29]
    picked, weights = matching_pursuit(vectors, wanted, Budget(10).meter(np.ones(40, dtype=int)), ridge=0.0)
    found = dict(zip(picked.tolist(), weights.tolist(), strict=True))
    assert found[29] == pytest.approx(3, abs=1e-3)
    assert found[3] == pytest.approx(2, abs=1e-3)
    np.testing.assert_allclose(weights @ vectors[picked], wanted, atol=1e-2)


def test_gradient_matching_beats_random_weights():
    pool = replace(pool_of(200), target=None)
    picks = pick("gradient-matching", pool, 10, ridge=0.0)
    mean = pool.vectors.mean(axis=0)
    error = np.linalg.norm(picks.weights @ pool.vectors[picks.positions] / 200 - mean)
    rng = np.random.default_rng(0)
    drawn = [np.linalg.norm(pool.vectors[rng.permutation(200)[:10]].mean(axis=0) - mean) for _ in range(20)]
    assert error < 0.1 * np.mean(drawn)


def test_deduplicate_keeps_the_best_of_each_cluster():
    pool = pool_of(60)
    vectors = np.repeat(np.random.default_rng(0).normal(size=(20, 6)), 3, axis=0)
    picks = pick("deduplicate", replace(pool, neighbours=ExactNeighbours(vectors)), 60, threshold=0.999)
    assert sorted(p // 3 for p in picks.positions) == list(range(20))
    assert all(pool.values[p] == pool.values[p // 3 * 3 : p // 3 * 3 + 3].max() for p in picks.positions)
    assert picks.removed == {"near-duplicates": 40}


def test_mutual_knn_drops_what_is_nobodys_neighbour():
    vectors = np.array([[1, 0.01 * i] for i in range(6)] + [[-0.3, -1]])
    lists = ExactNeighbours(vectors).graph(2)
    assert mutual_neighbours(lists).tolist()[-1] == 0
    assert mutual_neighbours(lists)[:-1].min() >= 1
    pool = replace(pool_of(7), neighbours=ExactNeighbours(vectors))
    picks = pick("mutual-knn", pool, 7, k=2, spread=True)
    assert set(picks.positions.tolist()) == set(range(6))
    assert picks.removed == {"isolated": 1}
    assert (picks.weights < 1).all()


def test_mahalanobis_distance_matches_its_definition():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(20_000, 3)) * [1, 5, 0.2]
    distance = mahalanobis_distance(np.array([[1.0, 0, 0], [0, 5, 0], [0, 0, 0.2]]), clean)
    np.testing.assert_allclose(distance, 1, rtol=0.05)
    assert np.isfinite(mahalanobis_distance(np.eye(3), np.ones((1, 3)))).all()


def test_mahalanobis_drops_planted_outliers():
    pool = pool_of(100)
    vectors = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    vectors[[5, 50]] *= 40
    assert {5, 50}.isdisjoint(
        pick("mahalanobis", replace(pool, vectors=vectors, target=None), 100, drop=0.02).positions.tolist()
    )


@pytest.mark.parametrize(("drop", "left"), [("both", 98), ("worse", 99)])
def test_opposing_signals_drops_loud_opposed_pairs(drop, left):
    pool = pool_of(100)
    vectors = np.abs(np.random.default_rng(0).normal(size=(100, 6))).astype(np.float32) * [1, 1, 1, 1, 0, 0]
    vectors[10], vectors[20] = 50 * np.eye(6)[5], -50 * np.eye(6)[5]
    picks = pick("opposing-signals", replace(pool, vectors=vectors), 100, large=0.9, drop=drop)
    assert len(picks.positions) == left
    worse = min((10, 20), key=lambda p: pool.values[p])
    assert worse not in picks.positions


def test_source_agreement_finds_the_source_that_pulls_away():
    source = np.array(["a", "b", "c"] * 20, dtype=object)
    vectors = np.where(source == "c", -1.0, 1.0)[:, None] + 0.1 * np.random.default_rng(0).normal(size=(60, 4))
    names, matrix = agreement(vectors, source)
    assert names.tolist() == ["a", "b", "c"]
    assert matrix[0, 1] > 0.9
    assert matrix[0, 2] < -0.9
    vectors[source == "b", 0] += 3
    picks = pick(
        "source-agreement", replace(pool_of(60), vectors=vectors, source=source, target=None), 60, minimum=-0.5
    )
    assert set(source[picks.positions]) == {"a", "b"}


def test_then_passes_on_what_a_stage_keeps():
    pool = pool_of(100)
    stages = [
        {"policy": "band", "low": 0.5, "high": 0.9},
        {"policy": "mutual-knn", "minimum": 0, "spread": True},
        {"policy": "k-center"},
    ]
    picks = pick("then", pool, 10, stages=stages)
    inside = pick("band", pool, 100, low=0.5, high=0.9).positions
    assert set(picks.positions.tolist()) <= set(inside.tolist())
    assert picks.removed["1 band: below the band"] == 50
    assert picks.reasons[0].startswith("highest within the band")
    assert (picks.weights <= 1).all()


def test_a_stage_may_have_a_budget_of_its_own():
    pool = pool_of(100)
    picks = pick("then", pool, 5, stages=[{"policy": "top", "budget": "20%"}, {"policy": "random"}])
    assert set(picks.positions.tolist()) <= set(pick("top", pool, 20).positions.tolist())


def test_union_takes_turns_by_weight():
    pool = pool_of(100)
    picks = pick("union", pool, 30, branches=[{"policy": "top", "weight": 2}, {"policy": "bottom", "weight": 1}])
    assert sum(reason.startswith("highest") for reason in picks.reasons) == 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("then", {"stages": []}, "no stages"),
        ("then", {"stages": [{"k": 1}]}, "names no policy"),
        ("union", {"branches": []}, "no branches"),
        ("then", {"stages": [{"policy": "top", "budget": 3}]}, "budget of its own"),
        ("union", {"branches": [{"policy": "top", "weight": 0}]}, "weights of branches"),
        ("union", {"branches": [{"policy": "top", "k": 0}]}, "no option"),
        ("quota", {"shares": {"codes": 1}}, "did you mean 'code'"),
        ("quota", {"shares": "even"}, "shares"),
        ("facility-location", {"k": 0}, "out of range"),
        ("mmr", {"trade": 2}, "trade"),
        ("coding-rate", {"epsilon": 0}, "epsilon"),
        ("match-target", {"over": "min"}, "over"),
        ("target-subspace", {"rank": 0}, "rank"),
        ("mahalanobis", {"drop": 1.0}, "drop"),
        ("mutual-knn", {"k": 0}, "out of range"),
        ("opposing-signals", {"cosine": 2}, "out of range"),
        ("gradient-matching", {"mode": "each"}, "out of range"),
        ("cluster-quota", {"clusters": 0}, "out of range"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        pick(name, pool_of(20), 5, **options)


def test_members_of_a_pool_see_each_other_as_if_they_were_alone():
    vectors = np.random.default_rng(0).normal(size=(40, 5))
    members = np.random.default_rng(1).permutation(40)[:25]
    part, alone = MemberNeighbours(ExactNeighbours(vectors), members), ExactNeighbours(vectors[members])
    whole = MemberNeighbours(ExactNeighbours(vectors), np.arange(40)[::-1])
    assert whole.graph(5)[3][0].tolist() == ExactNeighbours(vectors[::-1]).graph(5)[3][0].tolist()
    for query in range(25):
        # enough were asked for, so the nearest are among those that were found
        mine, reference = part.neighbours(np.array([query]), 3)[0], alone.neighbours(np.array([query]), 3)[0]
        assert mine[0].tolist() == reference[0][: len(mine[0])].tolist()
    assert part.duplicates(0.9).tolist() == alone.duplicates(0.9).tolist()
    assert part.neighbours_of(vectors[members[:2]], 1).positions.tolist() == [0, 1]
