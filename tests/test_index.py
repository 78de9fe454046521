"""The index answers as brute force does, whatever engine, order or batch; and what it saves it can open again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from selector.errors import GradientIndexError
from selector.index import Filter, GradientIndex


def pool(count: int, dimensions: int = 24, seed: int = 0) -> np.ndarray:
    """Clustered vectors with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(max(1, count // 50), dimensions))
    noise = 0.4 * rng.normal(size=(count, dimensions))
    return ((centers[rng.integers(0, len(centers), count)] + noise) * np.arange(1, dimensions + 1) ** -0.7).astype(
        np.float32
    )


def names(count: int) -> list[str]:
    return [f"sample-{i}" for i in range(count)]


def brute_force(queries: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """Similarities [Q, N] in float64."""
    queries, vectors = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "cosine":
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors)]
        return unit[0] @ unit[1].T
    return -np.linalg.norm(queries[:, None] - vectors[None], axis=2)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_exact_search_is_brute_force(metric, backend):
    vectors, queries = pool(700), pool(30, seed=1)
    found = GradientIndex.from_vectors(names(700), vectors, metric=metric, backend=backend).search(queries, 12)
    truth = brute_force(queries, vectors, metric)
    for query, (ids, similarities) in enumerate(found):
        order = np.argsort(-truth[query])[:12]
        assert ids.tolist() == [f"sample-{i}" for i in order]
        np.testing.assert_allclose(similarities, truth[query][order], atol=2e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_torch_answers_as_faiss_does(metric):
    vectors, queries = pool(3000), pool(50, seed=1)
    where = Filter(ranges={"n_tokens": (100, 2500)})
    results = [
        GradientIndex.from_vectors(
            names(3000), vectors, {"n_tokens": np.arange(3000)}, metric=metric, backend=backend
        ).search(queries, 10, where=where)
        for backend in ("faiss", "torch")
    ]
    np.testing.assert_array_equal(results[0].ids, results[1].ids)
    np.testing.assert_array_equal(results[0].lists.similarities, results[1].lists.similarities)


def test_answer_does_not_depend_on_batch():
    index = GradientIndex.from_vectors(names(2000), pool(2000))
    queries = pool(60, seed=1)
    together = index.search(queries, 10)
    for query in range(0, 60, 7):
        alone = index.search(queries[query : query + 1], 10)
        assert alone[0][0].tolist() == together[query][0].tolist()
        np.testing.assert_array_equal(alone[0][1], together[query][1])


def test_opposing_search_finds_the_other_way():
    vectors = pool(500)
    index = GradientIndex.from_vectors(names(500), vectors)
    ids, similarities = index.search_ids(["sample-7"], 3, opposing=True)[0]
    truth = brute_force(-vectors[7:8], vectors, "cosine")[0]
    assert ids.tolist() == [f"sample-{i}" for i in np.argsort(-truth)[:3]]
    np.testing.assert_allclose(similarities, np.sort(truth)[::-1][:3], atol=2e-6)


def test_a_member_is_not_its_own_neighbour_even_among_copies():
    vectors = np.repeat(pool(3), 40, axis=0)
    index = GradientIndex.from_vectors(names(120), vectors)
    found = index.neighbours(np.arange(120), 5)
    assert not (np.repeat(np.arange(120), np.diff(found.indptr)) == found.positions).any()
    assert found[0][0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_short_pools_give_short_lists(count):
    index = GradientIndex.from_vectors(names(count), pool(5)[:count])
    assert [len(ids) for ids, _ in index.search(pool(2, seed=1), 10)] == [count, count]
    assert len(index.graph(3)) == count


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8", "ivf-pq"])
def test_saved_index_opens_and_grows(kind, tmp_path):
    vectors, queries = pool(1500, 16), pool(5, 16, seed=1)
    index = GradientIndex.from_vectors(names(1500), vectors, {"source": ["a", "b", "c"] * 500}, kind=kind)
    index.save(tmp_path / "index")
    opened = GradientIndex.open(tmp_path / "index")
    assert opened.description == index.description
    np.testing.assert_array_equal(opened.search(queries, 5).ids, index.search(queries, 5).ids)
    opened.add(["new"], queries[:1], {"source": ["d"]})
    opened.save(tmp_path / "index")
    GradientIndex.verify(tmp_path / "index")
    again = GradientIndex.open(tmp_path / "index")
    assert len(again) == 1501
    assert again.search(queries[:1], 1)[0][0].tolist() == ["new"]
    assert again.search(queries[1:2], 5, where=Filter(sources=["d"]))[0][0].tolist() == ["new"]


@pytest.mark.parametrize("role", ["lists", "members", "space"])
def test_damaged_file_is_never_opened(role, tmp_path):
    GradientIndex.from_vectors(names(500), pool(500), kind="ivf").save(tmp_path)
    (file,) = tmp_path.glob(f"{role}-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(GradientIndexError, match=f"{role}-.* is damaged"):
        GradientIndex.open(tmp_path)


def test_manifest_names_every_file_and_nothing_else_stays(tmp_path):
    index = GradientIndex.from_vectors(names(300), pool(300), kind="ivf")
    index.save(tmp_path)
    index.add(["new"], pool(1, seed=3))
    index.save(tmp_path)
    listed = {entry["name"] for entry in json.loads((tmp_path / "manifest.json").read_text())["files"].values()}
    assert {file.name for file in tmp_path.iterdir()} == listed | {"manifest.json"}
