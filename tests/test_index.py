"""The index answers as brute force does, whatever engine, order or batch; and what it saves it can open again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from selector.errors import GradientIndexError
from selector.index import Filter, GradientIndex
from selector.index.tuning import check_device
from selector.neighbours import Neighbours


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


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8", "ivf-pq"])
def test_recall_reached_is_the_recall_reported(kind):
    vectors, queries = pool(22_000, 32), pool(300, 32, seed=0)
    index = GradientIndex.from_vectors(names(22_000), vectors, kind=kind)
    assert index.plan.recall >= 0.99
    truth = np.argsort(-brute_force(queries, vectors, "cosine"), axis=1)[:, :10]
    found = index.search(queries, 10).lists.positions.reshape(300, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert recall >= 0.98


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_short_codes_span_every_scale(scale):
    vectors = pool(5000, 32) * np.float32(scale)
    index = GradientIndex.from_vectors(names(5000), vectors, metric="l2", kind="ivf")
    assert index.plan.recall >= 0.99


def test_settings_of_faiss_are_put_back():
    faiss = pytest.importorskip("faiss")
    index = GradientIndex.from_vectors(names(500), pool(500), kind="ivf")
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    for count in (1, 5, 50):
        index.search(pool(count, seed=1))
    assert before == (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads())


@pytest.mark.parametrize("kind", ["ivf", "ivf-pq"])
def test_codes_that_a_gpu_cannot_search_are_refused_there(kind):
    with pytest.raises(GradientIndexError, match="on the CPU alone"):
        check_device(kind, "cuda")
    check_device("ivf-sq8", "cuda")


def test_flat_energy_is_searched_whole_and_says_so():
    vectors = np.random.default_rng(0).normal(size=(21_000, 16)).astype(np.float32)
    index = GradientIndex.from_vectors(names(21_000), vectors, kind="flat")
    assert index.plan.leading == 16
    assert "searched whole: a quarter of the dimensions holds only 0.5" in index.description


@pytest.mark.parametrize("kind", ["ivf", "ivf-pq"])
def test_rare_members_are_found_through_a_filter(kind, monkeypatch):
    monkeypatch.setattr("selector.index.pool.FEW", 0)
    source = np.where(np.arange(4000) % 97 == 0, "rare", "common")
    index = GradientIndex.from_vectors(names(4000), pool(4000), {"source": source}, kind=kind)
    for ids, _ in index.search(pool(20, seed=1), 60, where=Filter(sources=["rare"])):
        assert len(ids) == 42
        assert {int(i.split("-")[1]) % 97 for i in ids} == {0}


def test_filter_names_what_is_missing():
    index = GradientIndex.from_vectors(
        names(3), np.eye(3, dtype=np.float32), {"n_tokens": [1, 2, None], "source": ["a", "b", "c"]}
    )
    assert index.search(np.ones((1, 3)), where=Filter(ranges={"n_tokens": (None, None)})).ids.size == 3
    assert index.search(np.ones((1, 3)), where=Filter(ranges={"n_tokens": (1, None)})).ids.size == 2
    with pytest.raises(GradientIndexError, match="did you mean 'n_tokens'"):
        index.search(np.ones((1, 3)), where=Filter(ranges={"n_token": (1, None)}))
    with pytest.raises(GradientIndexError, match="'source' has no range"):
        index.search(np.ones((1, 3)), where=Filter(ranges={"source": (1, None)}))


@pytest.mark.parametrize(
    ("ids", "vectors", "options", "message"),
    [
        (["a", "a"], np.eye(2), {}, "ids are not unique"),
        (["a", "b"], np.eye(3), {}, "ids and metadata do not fit"),
        (["a", "b"], [[1, 0], [0, 0]], {}, "cannot be compared"),
        (["a", "b"], [[1, 0], [0, np.inf]], {"metric": "l2"}, "cannot be compared"),
        (["a", "b"], np.eye(2), {"recall": 1.0}, "recall is out of range"),
        (["a", "b"], np.eye(2), {"kind": "ivf"}, "the pool is too small"),
        (["a", "b"], np.eye(2), {"kind": "ivf", "backend": "torch"}, "takes FAISS"),
    ],
)
def test_what_cannot_be_indexed_is_refused(ids, vectors, options, message):
    with pytest.raises(GradientIndexError, match=message):
        GradientIndex.from_vectors(ids, np.asarray(vectors, dtype=np.float32), **options)


def test_unknown_ids_and_other_spaces_are_refused():
    index = GradientIndex.from_vectors(["a", "b"], np.eye(2, dtype=np.float32))
    with pytest.raises(GradientIndexError, match="1 ids are not in the index\n  got:     c"):
        index.search_ids(["a", "c"])
    with pytest.raises(GradientIndexError, match="vectors have the wrong shape"):
        index.search(np.ones((1, 3)))
    with pytest.raises(GradientIndexError, match="k is out of range"):
        index.search(np.ones((1, 2)), 0)
    with pytest.raises(GradientIndexError, match="the metadata has other columns"):
        index.add(["c"], np.ones((1, 2)), {"source": ["x"]})


def test_directory_in_use_by_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GradientIndexError, match="in use by something else"):
        GradientIndex.from_vectors(["a"], np.ones((1, 2))).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    old = GradientIndex.from_vectors(["a", "b"], np.eye(2, dtype=np.float32))
    old.save(tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("selector.index.storage.write_atomically", stop)
    old.add(["c"], np.ones((1, 2)))
    with pytest.raises(KeyboardInterrupt):
        old.save(tmp_path)
    assert len(GradientIndex.open(tmp_path)) == 2


def test_positions_of_the_index_serve_policies():
    assert isinstance(GradientIndex.from_vectors(["a"], np.ones((1, 2))), Neighbours)


@pytest.mark.gpu
def test_cuda_answers_as_the_cpu_does():
    vectors, queries = pool(30_000, 64), pool(200, 64, seed=1)
    found = [
        GradientIndex.from_vectors(names(30_000), vectors, kind="flat", device=device).search(queries, 10)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_array_equal(found[0].lists.similarities, found[1].lists.similarities)
