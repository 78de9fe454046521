"""Scores against each other: combination, correlation, and prediction from cheap features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from selector.errors import ConfigError, SelectionError
from selector.scores import Distilled, Embeddings, HashedWords, combine, correlations, spearman
from selector.scores.distill import ridge
from selector.testing import make_pool, shuffled


@pytest.mark.parametrize("how", ["rank", "z"])
def test_a_combination_leans_to_each_of_its_scores(how):
    a = make_pool(200)
    b = replace(a, values=make_pool(200, seed=1).values)
    both = combine({"a": a, "b": b}, how=how)
    assert spearman(both.values, a.values) > 0.5
    assert spearman(both.values, b.values) > 0.5
    leaning = combine({"a": a, "b": b}, {"a": 5, "b": -1}, how=how)
    assert spearman(leaning.values, a.values) > 0.9
    assert spearman(leaning.values, b.values) < 0


def test_rank_combination_ignores_monotone_changes():
    a = make_pool(50, missing=0.1)
    np.testing.assert_array_equal(combine({"a": a}).values, combine({"a": replace(a, values=np.exp(a.values))}).values)


def test_a_sample_without_one_of_the_scores_has_no_combined_score():
    a, b = make_pool(50, missing=0.2), replace(make_pool(50), values=make_pool(50, seed=3, missing=0.2).values)
    missing = np.isnan(a.values) | np.isnan(b.values)
    np.testing.assert_array_equal(np.isnan(combine({"a": a, "b": b}).values), missing)


def test_what_cannot_be_combined_is_refused():
    a = make_pool(5)
    with pytest.raises(ConfigError, match="did you mean 'loss'"):
        combine({"loss": a}, {"los": 1})
    with pytest.raises(ConfigError, match="no weight counts"):
        combine({"a": a}, {"a": 0})
    with pytest.raises(ConfigError, match="cannot be combined so"):
        combine({"a": a}, how="mean")
    with pytest.raises(SelectionError, match="other samples"):
        combine({"a": a, "b": shuffled(a, np.arange(5)[::-1].copy())})


def test_correlations_include_length():
    a = make_pool(100)
    names, matrix = correlations({"a": a, "length": replace(a, values=-a.n_tokens.astype(float))})
    assert names == ["a", "length", "n_tokens", "n_loss_tokens"]
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix[1, 2] == pytest.approx(-1)


def word_pool(n: int = 600):
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(60)])
    worth = rng.normal(size=60)
    drawn = rng.integers(0, 60, (n, 12))
    return [" ".join(words[row]) for row in drawn], worth[drawn].mean(axis=1)


def test_a_score_made_of_words_is_predicted_from_words():
    texts, values = word_pool()
    known = np.where(np.arange(600) < 400, values, np.nan)
    features = HashedWords.of(texts)
    model = Distilled.fit(features, known)
    assert model.held_out > 0.8
    assert len(model.judged) == 40
    assert (model.judged < 400).all()
    assert spearman(model.predict(features)[400:], values[400:]) > 0.8
    filled = model.fill(features, known)
    np.testing.assert_array_equal(filled[:400], values[:400])
    assert np.isfinite(filled).all()


def test_a_score_without_relation_to_the_text_is_said_to_be_unpredictable():
    texts, values = word_pool()
    assert Distilled.fit(HashedWords.of(texts), np.random.default_rng(1).permutation(values)).held_out < 0.4


def test_a_linear_score_of_embeddings_is_predicted():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    assert Distilled.fit(Embeddings(vectors), vectors @ rng.normal(size=8)).held_out > 0.95


def test_ridge_by_conjugate_gradients_is_ridge():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=40)
    penalty = 0.3 * np.square(x).sum(axis=1).mean()
    np.testing.assert_allclose(
        ridge(Embeddings(x), y, 0.3), np.linalg.solve(x.T @ x + penalty * np.eye(6), x.T @ y), atol=1e-8
    )


def test_hashed_words_are_a_matrix():
    features = HashedWords.of(["a b", "", "b b c"])
    weights = np.random.default_rng(0).normal(size=1 << 18)
    product = features.dot(weights)
    assert product[1] == 0
    np.testing.assert_allclose(features.take(np.array([2, 0])).dot(weights), product[[2, 0]])
    rows = np.array([1.0, 2.0, 3.0])
    assert features.transposed_dot(rows) @ weights == pytest.approx(rows @ product)
    assert features.scaled(features.column_scale()).mean_square() == pytest.approx(2 / 3)


def test_too_few_scores_cannot_be_predicted():
    with pytest.raises(SelectionError, match="20 or more"):
        Distilled.fit(Embeddings(np.ones((19, 2))), np.arange(19.0))
