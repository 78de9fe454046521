"""Aggregation, length control, the score of a store, and the table of scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import ConfigError, SelectionError
from selector.scores import (
    HIGHER_FIRST,
    Aggregation,
    aggregate,
    length_correlation,
    load_control,
    read_provenance,
    read_scores,
    score,
    spearman,
    spearman_interval,
    write_scores,
)
from selector.scores.aggregate import feature_scale
from selector.scores.length import CONTROLS, control_class, natural_spline
from selector.store import FeatureStore, StoreWriter
from selector.store.schema import Manifest
from selector.store.writer import create
from selector.types import MEASURES, LayerSpec

LAYERS = tuple(
    LayerSpec(name=f"layers.{i}.{p}", layer=i, projection=p, in_features=8, out_features=8)
    for i in range(4)
    for p in ("q", "v")
)


def make_store(path, n=400, *, seed=0, failed=(), order=None, shard_rows=64):
    """A store whose effective rank grows with length and carries a small quality of its own."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(identity={"model": "made up"}, layers=LAYERS, expected=n)
    create(path, manifest)
    writer = StoreWriter(path, manifest, shard_rows=shard_rows)
    n_loss = np.exp(rng.uniform(np.log(4), np.log(500), n)).astype(int)
    n_prompt = np.exp(rng.uniform(np.log(4), np.log(200), n)).astype(int)
    quality = rng.normal(size=n) * 0.1
    features = np.exp(0.7 * np.log(n_loss + n_prompt) - 0.02 * np.log(n_loss) ** 2 + quality)[:, None] * np.exp(
        rng.normal(size=(n, len(LAYERS))) * 0.01
    )
    for i in order if order is not None else range(n):
        ok = i not in failed
        row = {
            "sample_id": f"s{i:04d}",
            "row": i,
            "source": "ab"[i % 2],
            "n_tokens": int(n_loss[i] + n_prompt[i]),
            "n_loss_tokens": int(n_loss[i]),
            "truncated": False,
            "status": "ok" if ok else "zero_gradient",
            "loss": 2.0 if ok else None,
        }
        writer.add(
            {
                **row,
                **{name: features[i].astype(np.float32) * (k + 1) if ok else None for k, name in enumerate(MEASURES)},
            }
        )
    writer.flush()
    return FeatureStore.open(path), quality


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "features", failed={7, 8})


def test_length_control_removes_length_and_keeps_quality(store):
    scores = score(store[0])
    correlation = length_correlation(scores)
    assert correlation.raw > 0.8
    assert abs(correlation.controlled) < 0.1
    assert spearman(scores.values, store[1]) > 0.9


def test_failed_samples_have_no_score(store):
    scores = score(store[0])
    assert np.flatnonzero(np.isnan(scores.values)).tolist() == [7, 8]
    assert scores.provenance["without_score"] == 2


def test_scores_do_not_depend_on_the_order_of_writing(tmp_path, store):
    shuffled, _ = make_store(
        tmp_path / "features", failed={7, 8}, order=np.random.default_rng(5).permutation(400), shard_rows=50
    )
    first, second = score(store[0]), score(shuffled)
    assert first.ids.tolist() == second.ids.tolist()
    np.testing.assert_array_equal(first.raw, second.raw)
    np.testing.assert_array_equal(first.values, second.values)


@pytest.mark.parametrize("by", HIGHER_FIRST)
def test_every_score_states_its_direction(store, by):
    up, down = score(store[0], by, higher_first=True), score(store[0], by, higher_first=False)
    np.testing.assert_array_equal(up.values, -down.values)
    default = score(store[0], by)
    np.testing.assert_array_equal(default.values, (up if HIGHER_FIRST[by] else down).values)
    assert default.provenance["higher_first"] is HIGHER_FIRST[by]


def test_stable_rank_is_the_squared_ratio_of_norms(store):
    raw = score(store[0], "stable_rank", control="none").raw
    np.testing.assert_allclose(raw[0], (3 / 4) ** 2, rtol=1e-5)


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_fit_survives_json_and_applies_to_another_pool(store, kind):
    scores = score(store[0], control=kind)
    fit = load_control(json.loads(json.dumps(scores.provenance["control"])))
    np.testing.assert_array_equal(score(store[0], control=fit).values, scores.values)
    longer = fit.apply(np.array([50.0, np.nan, 0.0]), np.array([10**6, 1, 1]), np.array([10**6, 1, 1]))
    assert np.isfinite(longer[0])
    assert np.isnan(longer[1])


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_can_be_undone_at_any_length(store, kind):
    scores = score(store[0], control=kind)
    control = load_control(scores.provenance["control"])
    prompt, completion = scores.n_tokens - scores.n_loss_tokens, scores.n_loss_tokens
    np.testing.assert_allclose(control.restore(scores.values, prompt, completion), scores.raw, rtol=1e-9)
    longer = control.restore(scores.values, prompt * 3, completion * 3)
    np.testing.assert_allclose(control.apply(longer, prompt * 3, completion * 3), scores.values, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.sampled_from(sorted(CONTROLS)))
def test_controls_bear_small_and_flat_pools(n, spread, kind):
    rng = np.random.default_rng(n)
    prompt, completion = rng.integers(0, spread + 1, n), rng.integers(1, spread + 2, n)
    raw = np.exp(rng.normal(size=n))
    values = control_class(kind).fit(raw, prompt, completion).apply(raw, prompt, completion)
    assert values.shape == (n,)
    assert np.isfinite(values).all()


def test_a_spline_control_is_scale_free():
    rng = np.random.default_rng(0)
    prompt, completion, raw = rng.integers(1, 99, 500), rng.integers(1, 99, 500), np.exp(rng.normal(size=500))
    fits = [
        control_class("length").fit(scale * raw, prompt, completion).apply(scale * raw, prompt, completion)
        for scale in (1, 1e-6)
    ]
    np.testing.assert_allclose(*fits, atol=1e-4)


def test_a_spline_control_is_the_residual_of_least_squares():
    rng = np.random.default_rng(0)
    prompt, completion, raw = rng.integers(0, 99, 400), rng.integers(1, 99, 400), np.exp(rng.normal(size=400))
    fit = control_class("length").fit(raw, prompt, completion)
    lengths = [np.log1p(x) for x in (prompt, completion, prompt + completion)]
    blocks = [natural_spline(x, np.array(knots)) for x, knots in zip(lengths, fit.knots, strict=True)]
    design = np.column_stack([np.ones(400), *blocks])
    residual = np.log(raw) - design @ np.linalg.lstsq(design, np.log(raw), rcond=None)[0]
    np.testing.assert_allclose(fit.apply(raw, prompt, completion), residual, atol=1e-3)
    assert fit.explained == pytest.approx(1 - residual.var() / np.log(raw).var(), abs=1e-6)


def test_natural_splines_are_straight_beyond_their_knots():
    knots = np.array([0.0, 1.0, 2.5, 4.0])
    for outside in (np.array([-3.0, -2.0, -1.0, 0.0]), np.array([4.0, 5.0, 6.0, 7.0])):
        np.testing.assert_allclose(np.diff(natural_spline(outside, knots), n=2, axis=0), 0, atol=1e-10)


def test_natural_splines_interpolate_smooth_functions():
    x = np.linspace(0, 4, 200)
    basis = np.column_stack([np.ones(200), natural_spline(x, np.linspace(0, 4, 8))])
    fitted = basis @ np.linalg.lstsq(basis, np.sin(x), rcond=None)[0]
    assert np.abs(fitted - np.sin(x)).max() < 0.02


def test_geometric_and_arithmetic_means_leave_out_missing_entries():
    features = np.array([[1.0, 4.0, np.nan, 16.0, *[np.nan] * 4], [np.nan] * 8])
    np.testing.assert_allclose(aggregate(features, LAYERS, Aggregation()), [4.0, np.nan])
    np.testing.assert_allclose(aggregate(features, LAYERS, Aggregation(mean="arithmetic")), [7.0, np.nan])


def test_equal_samples_tie_wherever_they_lie():
    features = np.tile(np.random.default_rng(0).random((1, 8)).astype(np.float32), (37, 1))
    assert len(np.unique(aggregate(features, LAYERS, Aggregation()))) == 1


def test_aggregation_takes_the_part_of_the_table_that_is_named():
    features = np.arange(1.0, 9.0)[None]
    mean = lambda **kwargs: aggregate(features, LAYERS, Aggregation(mean="arithmetic", **kwargs))[0]  # noqa: E731
    assert mean(projections=("v",)) == np.mean([2, 4, 6, 8])
    assert mean(last=1) == np.mean([7, 8])
    assert mean(depth=(0.3, 0.7)) == np.mean([3, 4, 5, 6])
    assert mean(weights={"v": 0, "3.q": 3}) == pytest.approx((1 + 3 + 5 + 3 * 7) / 6)
    assert aggregate(features, LAYERS, Aggregation(mean="difference"))[0] == 2.0


def test_unit_scale_gives_every_layer_the_same_say():
    features = np.random.default_rng(0).random((50, 8)) * 10.0 ** np.arange(8)
    scaled = aggregate(features, LAYERS, Aggregation(mean="arithmetic", scale="unit"), feature_scale(features, "unit"))
    np.testing.assert_allclose(scaled, (features / features.mean(axis=0)).mean(axis=1))
    clipped = aggregate(features, LAYERS, Aggregation(mean="arithmetic", scale="clip"), feature_scale(features, "clip"))
    np.testing.assert_allclose(clipped, np.minimum(features, np.median(features, axis=0)).mean(axis=1))


def test_a_scaled_score_of_a_store_uses_the_whole_pool(store):
    raw = score(store[0], aggregation=Aggregation(scale="unit", mean="arithmetic"), control="none").raw
    assert np.nanmean(raw) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last": 0}, "last"),
        ({"depth": (0.8, 0.2)}, "depth"),
        ({"mean": "median"}, "mean"),
        ({"scale": "z"}, "scale"),
        ({"weights": {"q": -1}}, "weights"),
    ],
)
def test_impossible_aggregations_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Aggregation(**settings)


def test_unknown_names_are_refused_with_a_suggestion(store):
    with pytest.raises(ConfigError, match="did you mean 'effective_rank'"):
        score(store[0], "effective_rnak")
    with pytest.raises(ConfigError, match="did you mean 'spline'"):
        score(store[0], control="splin")
    with pytest.raises(ConfigError, match="no such projection"):
        score(store[0], aggregation=Aggregation(projections=("up",)))


def test_spearman_matches_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 80).astype(float), rng.integers(0, 9, 80).astype(float)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    a[3] = np.nan
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b, nan_policy="omit").statistic)
    assert np.isnan(spearman(a, np.ones(80)))


def test_spearman_intervals_hold_the_truth_as_often_as_they_say():
    rng, truth = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.6 / 2)
    held = 0
    for _ in range(400):
        x = rng.normal(size=60)
        y = 0.6 * x + 0.8 * rng.normal(size=60)
        low, high = spearman_interval(spearman(x, y), 60)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98
    assert spearman_interval(0.9, 3) == (-1.0, 1.0)
    assert spearman_interval(float("nan"), 50) == (-1.0, 1.0)


def test_a_table_of_scores_reads_back_what_was_written(tmp_path, store):
    written = {"effective_rank": score(store[0]), "loss": score(store[0], "loss")}
    write_scores(tmp_path / "scores.parquet", written)
    assert list(read_provenance(tmp_path / "scores.parquet")) == ["effective_rank", "loss"]
    for name, scores in written.items():
        back = read_scores(tmp_path / "scores.parquet", name)
        for column in ("ids", "rows", "values", "raw", "n_tokens", "n_loss_tokens", "source"):
            np.testing.assert_array_equal(getattr(back, column), getattr(scores, column))
        assert back.provenance == scores.provenance


def test_a_table_of_scores_refuses_what_it_is_not(tmp_path, store):
    path = tmp_path / "scores.parquet"
    with pytest.raises(SelectionError, match="no table of scores"):
        read_scores(path)
    write_scores(path, {"effective_rank": score(store[0])})
    with pytest.raises(SelectionError, match="did you mean 'effective_rank'"):
        read_scores(path, "effective")
    small = make_store(tmp_path / "features", n=3)[0]
    with pytest.raises(SelectionError, match="other samples"):
        write_scores(path, {"a": score(store[0]), "b": score(small)})
