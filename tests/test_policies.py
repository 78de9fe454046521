"""Every policy keeps its contract, and does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.errors import ConfigError, SelectionError
from selector.policies import POLICIES, Budget, Pool, run_policy
from selector.testing import ContractError, check_policy, make_pool
from selector.types import Picks


@pytest.mark.parametrize(
    ("name", "exact", "options"),
    [
        ("top", True, {}),
        ("bottom", True, {}),
        ("random", True, {}),
        ("proportional", True, {}),
        ("band", False, {}),
        ("threshold", False, {"minimum": 0.0}),
    ],
)
def test_policy_keeps_the_contract(name, exact, options):
    check_policy(name, exact=exact, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (500, Budget(500)),
        ("500", Budget(500)),
        ("1", Budget(1)),
        (1.0, Budget(1.0, relative=True)),
        (0.1, Budget(0.1, relative=True)),
        ("0.1", Budget(0.1, relative=True)),
        ("10%", Budget(0.1, relative=True)),
        ("200k tokens", Budget(200_000, "tokens")),
        ("1.5M samples", Budget(1_500_000)),
        ("200000t", Budget(200_000, "tokens")),
        ("1 token", Budget(1, "tokens")),
        ("10% tokens", Budget(0.1, "tokens", relative=True)),
        ("2k", Budget(2000)),
    ],
)
def test_budgets_are_read_as_people_write_them(text, expected):
    assert Budget.parse(text) == expected
    assert Budget.parse(str(expected).replace("of the ", "")) == expected


@pytest.mark.parametrize("text", ["", "ten", "-5", -5, 1.5, "120%", "1.5", "2.5 samples", True, None, "10 parsecs"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 400), st.sampled_from(["samples", "tokens"]))
def test_meter_and_prefix_agree(n_tokens, amount, unit):
    n_tokens, budget = np.array(n_tokens, dtype=np.int64), Budget(amount, unit)
    order = np.random.default_rng(0).permutation(len(n_tokens))
    meter, taken = budget.meter(n_tokens), []
    while len(taken) < len(order) and meter.take(int(order[len(taken)])):
        taken.append(int(order[len(taken)]))
    assert taken == budget.prefix(order, n_tokens).tolist()


def test_top_is_sorted_and_ties_go_to_the_smaller_id():
    scores = make_pool(60, ties=True)
    picks = run_policy("top", scores, Budget(40), seed=0)
    keys = [(-scores.values[p], scores.ids[p]) for p in picks.positions]
    assert keys == sorted(keys)
    assert picks.reasons[0] == "highest: rank 1 of 60"


def test_bottom_breaks_ties_like_top():
    scores = make_pool(60, ties=True)
    picks = run_policy("bottom", scores, Budget(40), seed=0)
    keys = [(scores.values[p], scores.ids[p]) for p in picks.positions]
    assert keys == sorted(keys)


def test_band_has_a_floor_and_a_cap():
    scores = make_pool(100)
    picks = run_policy("band", scores, Budget(100), seed=0, low=0.5, high=0.9)
    ranks = np.argsort(np.argsort(-scores.values))[picks.positions]
    assert ranks.tolist() == list(range(10, 50))
    assert picks.removed == {"above the band": 10, "below the band": 50}


def test_threshold_takes_what_lies_between():
    scores = make_pool(100)
    picks = run_policy("threshold", scores, Budget(100), seed=0, minimum=-0.5, maximum=0.5)
    inside = (scores.values >= -0.5) & (scores.values <= 0.5)
    assert set(picks.positions.tolist()) == set(np.flatnonzero(inside).tolist())
    assert sum(picks.removed.values()) == (~inside).sum()


def test_random_depends_on_the_seed_and_is_fair():
    scores = make_pool(40)
    counts = np.zeros(40)
    for seed in range(300):
        counts[run_policy("random", scores, Budget(10), seed=seed).positions] += 1
    assert counts.sum() == 3000
    assert counts.min() > 40
    assert counts.max() < 115


def test_samples_without_a_score_are_counted():
    scores = make_pool(100, missing=0.3)
    assert run_policy("random", scores, Budget(5), seed=0).removed["no score"] == np.isnan(scores.values).sum()


def test_a_share_is_of_the_samples_that_have_a_score():
    scores = make_pool(100, missing=0.5)
    assert len(run_policy("top", scores, Budget.parse("50%"), seed=0).positions) == round(
        np.isfinite(scores.values).sum() * 0.5
    )


def test_options_are_checked():
    scores = make_pool(5)
    with pytest.raises(ConfigError, match="did you mean 'minimum'"):
        run_policy("threshold", scores, Budget(1), seed=0, minimun=1.0)
    with pytest.raises(ConfigError, match="needs options"):
        run_policy("threshold", scores, Budget(1), seed=0)
    with pytest.raises(ConfigError, match="band"):
        run_policy("band", scores, Budget(1), seed=0, low=0.9, high=0.5)
    with pytest.raises(ConfigError, match="did you mean 'top'"):
        run_policy("topp", scores, Budget(1), seed=0)


def test_a_pool_that_is_out_of_order_is_refused():
    columns = np.zeros(2), np.ones(2, dtype=int), np.array(["", ""])
    with pytest.raises(SelectionError, match="not in order"):
        Pool(np.array(["b", "a"]), *columns)
    with pytest.raises(SelectionError, match="without a score"):
        Pool(np.array(["a", "b"]), np.array([np.nan, 1.0]), *columns[1:])


@pytest.mark.parametrize("flaw", ["outside", "budget", "twice", "chance", "silent"])
def test_the_checker_finds_a_policy_that_breaks_its_contract(flaw, monkeypatch):
    calls = []

    def broken(pool: Pool, budget: Budget, *, seed: int) -> Picks:
        order = np.argsort(pool.values, kind="stable")
        if flaw == "chance":
            calls.append(0)
            order = np.roll(order, len(calls))
        picked = order if flaw == "budget" else budget.prefix(order, pool.n_tokens)
        if flaw == "twice" and len(picked) > 1:
            picked = np.concatenate([picked[:1], picked[:-1]])
        if flaw == "outside":
            picked = np.array([len(pool)] * bool(len(picked)), dtype=int)
        return Picks(picked, np.array(["" if flaw == "silent" else "why"] * len(picked), dtype=object))

    monkeypatch.setitem(POLICIES._parts, "broken", broken)
    with pytest.raises(SelectionError if flaw == "outside" else ContractError, match="policy 'broken'"):
        check_policy("broken")
