"""Features become vectors the same way at every time; the rotation changes no distance and puts the wide axes first."""

from __future__ import annotations

import numpy as np
import pytest
from test_scores import LAYERS, make_store

from selector.errors import GradientIndexError
from selector.index import Filter, GradientIndex
from selector.index.rotation import PCA_LIMIT, Rotation
from selector.index.vectors import Standardization
from selector.scores import score
from selector.store import FeatureStore
from selector.types import MEASURES


def features(count: int, layers: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.exp(rng.normal(i, i + 1, size=(count, layers))).astype(np.float32) for i, name in enumerate(MEASURES)
    }


KEYS = [f"{i}.q" for i in range(6)]


@pytest.mark.parametrize("method", ["z", "robust"])
def test_vectors_are_centered_and_scaled(method):
    pool = features(4000)
    vectors = Standardization.fit(pool, KEYS, method).apply(pool)
    assert vectors.shape == (4000, 24)
    center = vectors.mean(axis=0) if method == "z" else np.median(vectors, axis=0)
    np.testing.assert_allclose(center, 0, atol=1e-3)
    np.testing.assert_allclose(vectors.std(axis=0), 1, atol=1e-3 if method == "z" else 0.1)


def test_scale_of_a_measure_does_not_matter():
    pool = features(300)
    scaled = {**pool, "nuclear_norm": 1000 * pool["nuclear_norm"]}
    first, second = (Standardization.fit(values, KEYS).apply(values) for values in (pool, scaled))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_missing_and_constant_features_move_no_distance():
    pool = features(200)
    pool["effective_rank"][:, 2] = 7.0
    pool["spectral_norm"][5, 3] = np.nan
    pool["frobenius_norm"][:, 4] = np.nan
    pool["nuclear_norm"][6, 1] = 0.0
    fit = Standardization.fit(pool, KEYS)
    vectors = fit.apply(pool)
    assert np.isfinite(vectors).all()
    assert fit.missing == 202
    names = [(measure, layer) for measure in MEASURES for layer in range(6)]
    assert not vectors[:, names.index(("effective_rank", 2))].any()
    assert not vectors[:, names.index(("frobenius_norm", 4))].any()
    assert vectors[5, names.index(("spectral_norm", 3))] == 0
    assert vectors[6, names.index(("nuclear_norm", 1))] == 0


def test_one_outlier_does_not_move_a_robust_fit():
    pool = features(500)
    fit = Standardization.fit(pool, KEYS, "robust")
    spoiled = {name: values.copy() for name, values in pool.items()}
    spoiled["nuclear_norm"][0] = 1e30
    np.testing.assert_allclose(Standardization.fit(spoiled, KEYS, "robust").scale, fit.scale, rtol=0.02)


def test_features_of_another_layer_table_are_refused():
    fit = Standardization.fit(features(20), KEYS)
    with pytest.raises(GradientIndexError, match="the features do not fit the index"):
        fit.apply(features(20, layers=5))


@pytest.mark.parametrize("dimensions", [3, 8, 30, PCA_LIMIT + 1])
def test_rotation_keeps_distances_and_sorts_energy(dimensions):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, dimensions)) * rng.uniform(0.1, 3, dimensions)).astype(np.float32)
    rotation = Rotation.fit(vectors)
    rotated = rotation.apply(vectors)
    assert rotated.shape[1] % 8 == 0
    np.testing.assert_allclose(
        np.linalg.norm(rotated[0] - rotated[1:], axis=1), np.linalg.norm(vectors[0] - vectors[1:], axis=1), rtol=1e-4
    )
    assert (np.diff(rotation.energy) >= 0).all()
    assert rotation.energy[-1] == pytest.approx(1)
    variances = rotated.var(axis=0)
    np.testing.assert_allclose(np.cumsum(variances) / variances.sum(), rotation.energy, atol=1e-3)


def test_store_is_indexed_saved_and_extended(tmp_path):
    store, _ = make_store(tmp_path / "store", 200, failed={3})
    index = GradientIndex.build(store, scores=score(store), kind="ivf")
    assert len(index) == 199
    assert "s0003" not in index.ids
    index.save(tmp_path / "index")
    opened = GradientIndex.open(tmp_path / "index")
    assert opened.store == store.manifest.fingerprint
    raw = {name: store.features(name)[:5] for name in MEASURES}
    ids = [found[0] for found, _ in opened.search(opened.standardization.apply(raw)[[0, 1, 2, 4]], 1)]
    assert ids == ["s0000", "s0001", "s0002", "s0004"]
    low, high = score(store).values[10], np.inf
    found = opened.search_ids(["s0010"], 50, where=Filter(sources=["a"], ranges={"score": (low, high)}))[0][0]
    by_id = dict(zip(score(store).ids, score(store).values, strict=True))
    assert len(found) > 0
    assert all(by_id[i] >= low and int(i[1:]) % 2 == 0 for i in found)
    with pytest.raises(GradientIndexError, match="in the index already"):
        opened.add_store(store, score(store))


def test_added_store_goes_through_the_first_fit(tmp_path):
    store, _ = make_store(tmp_path / "store", 100)
    index = GradientIndex.build(store)
    extended = GradientIndex.from_vectors(["only"], np.ones((1, 4 * len(LAYERS)), dtype=np.float32))
    with pytest.raises(GradientIndexError, match="the store does not fit the index"):
        extended.add_store(store)
    vectors = index.standardization.apply({name: store.features(name)[:1] * 2 for name in MEASURES})
    columns = ("row", "source", "n_tokens", "n_loss_tokens", "loss")
    index.add(["copy"], vectors, {name: index.metadata(["s0000"])[name].to_numpy() for name in columns})
    assert index.metadata(["copy"])["n_tokens"].to_pylist() == index.metadata(["s0000"])["n_tokens"].to_pylist()
    assert index.search(vectors, 1)[0][0].tolist() == ["copy"]


def test_store_without_a_scored_sample_is_refused(tmp_path):
    store, _ = make_store(tmp_path / "store", 3, failed={0, 1, 2})
    assert isinstance(store, FeatureStore)
    with pytest.raises(GradientIndexError, match="holds no sample with a score"):
        GradientIndex.build(store)
