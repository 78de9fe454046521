"""Near-duplicates and range search lose no pair, whatever the cells, and do not drown in templates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import GradientIndexError
from selector.index import Filter, GradientIndex, duplicates
from selector.index.duplicates import duplicate_labels, join


def plain_labels(vectors: np.ndarray, radius: float) -> np.ndarray:
    """Components by all pairs in float64: the smallest position that a chain reaches."""
    x = vectors.astype(np.float64)
    close = ((x[:, None] - x[None]) ** 2).sum(axis=2) <= radius**2
    labels = np.arange(len(x))
    while not np.array_equal(smaller := np.where(close, labels, len(x)).min(axis=1, initial=len(x)), labels):
        labels = smaller
    return labels


def clusters(count: int, dimensions: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(max(1, count // 8), dimensions))
    return (centers[rng.integers(0, len(centers), count)] + spread * rng.normal(size=(count, dimensions))).astype(
        np.float32
    )


@given(
    count=st.integers(0, 120), dimensions=st.integers(1, 12), leading=st.integers(1, 12),
    spread=st.sampled_from([0.0, 0.05, 0.5]), radius=st.sampled_from([0.0, 0.1, 0.4, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_clusters_are_those_of_all_pairs(count, dimensions, leading, spread, radius, seed):
    vectors = clusters(count, dimensions, spread, seed)
    with pytest.MonkeyPatch.context() as patch:
        # small cells and small blocks, so that few vectors cross every border
        for name, value in (("PER_CELL", 6), ("CROWDED", 10), ("BLOCK", 4), ("BALLS", 2), ("CELLS", 3)):
            patch.setattr(duplicates, name, value)
        labels = duplicate_labels(vectors, radius, leading=min(leading, dimensions), seed=seed)
    np.testing.assert_array_equal(labels, plain_labels(vectors, radius))


@given(edges=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_join_names_the_smallest_of_each_component(edges):
    labels = np.arange(20)
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2)
    join(labels, ends[:, 0], ends[:, 1])
    plain = np.arange(20)
    for _ in range(20):
        for i, j in edges:
            plain[i] = plain[j] = min(plain[i], plain[j])
    np.testing.assert_array_equal(labels, plain)


def test_a_pool_of_copies_is_one_cluster_without_a_pair_explosion():
    copies = np.tile(clusters(1, 16, 0.0, 0), (200_000, 1))
    copies[::2] += 1e-4 * np.random.default_rng(0).normal(size=(100_000, 16)).astype(np.float32)
    assert (duplicate_labels(copies, 0.01, leading=16) == 0).all()


def test_answer_does_not_depend_on_the_order_of_members():
    vectors = clusters(3000, 16, 0.05, 1)
    order = np.random.default_rng(2).permutation(3000)
    labels, shuffled = (duplicate_labels(x, 0.2, leading=8) for x in (vectors, vectors[order]))
    together = labels[:, None] == labels[None]
    np.testing.assert_array_equal((shuffled[:, None] == shuffled[None]), together[np.ix_(order, order)])


@pytest.mark.parametrize(("metric", "threshold"), [("cosine", 0.98), ("l2", -0.25)])
def test_index_finds_duplicates_by_similarity(metric, threshold):
    vectors = clusters(600, 16, 0.05, 3)
    index = GradientIndex.from_vectors([f"s{i}" for i in range(600)], vectors, metric=metric)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if metric == "cosine" else vectors
    radius = np.sqrt(2 * (1 - threshold)) if metric == "cosine" else -threshold
    labels = index.duplicates(threshold)
    assert 1 < len(np.unique(labels)) < 600
    np.testing.assert_array_equal(labels, plain_labels(unit, radius))


@pytest.mark.parametrize(("metric", "threshold"), [("cosine", 0.7), ("l2", -1.5)])
def test_range_search_returns_every_member_above_the_threshold(metric, threshold):
    vectors, queries = clusters(900, 12, 0.4, 4), clusters(20, 12, 0.4, 5)
    index = GradientIndex.from_vectors(
        [f"s{i}" for i in range(900)], vectors, {"n_tokens": np.arange(900)}, metric=metric
    )
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        x, q = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, q))
    truth = q @ x.T if metric == "cosine" else -np.linalg.norm(q[:, None] - x[None], axis=2)
    for row, (ids, similarities) in enumerate(index.search_within(queries, threshold)):
        assert {f"s{i}" for i in np.flatnonzero(truth[row] >= threshold)} == set(ids)
        assert (np.diff(similarities) <= 0).all()
    ids, _ = index.search_ids_within(
        ["s5"], -0.99 if metric == "cosine" else -50.0, where=Filter(ranges={"n_tokens": (0, 9)})
    )[0]
    assert set(ids) == {f"s{i}" for i in range(10)} - {"s5"}


@pytest.mark.parametrize(("metric", "threshold"), [("cosine", 1.5), ("cosine", -1.0), ("l2", 0.5)])
def test_threshold_out_of_range_is_refused(metric, threshold):
    index = GradientIndex.from_vectors(["a", "b"], np.eye(2, dtype=np.float32), metric=metric)
    with pytest.raises(GradientIndexError, match="the similarity is out of range"):
        index.duplicates(threshold)
