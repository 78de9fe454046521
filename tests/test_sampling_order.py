"""Orders are permutations, follow weights, ids and strata, and never depend on where a sample lies."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.sampling.order import Groups, deal, id_keys, weighted_order

SIZES = st.integers(0, 300)
GOLDEN = [1, 7, 3, 6, 4, 0, 5, 2]


def keys(n: int) -> np.ndarray:
    return id_keys([f"sample-{i}" for i in range(n)])


@given(n=SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 9), weighted=st.booleans())
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int, weighted: bool) -> None:
    weights = np.random.default_rng(seed).exponential(size=n) if weighted else None
    order = weighted_order(keys(n), weights, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(2, 200), limit=st.integers(0, 250), seed=st.integers(0, 99))
def test_a_limited_order_is_the_head_of_the_whole_one(n: int, limit: int, seed: int) -> None:
    whole = weighted_order(keys(n), seed=seed)
    assert weighted_order(keys(n), seed=seed, limit=limit).tolist() == whole[:limit].tolist()


def test_seed_epoch_and_draw_each_give_another_order() -> None:
    orders = {
        tuple(weighted_order(keys(50), seed=seed, epoch=epoch, draw=draw).tolist())
        for seed in range(3) for epoch in range(3) for draw in range(3)
    }  # fmt: skip
    assert len(orders) == 27


@given(n=st.integers(2, 100), dropped=st.integers(0, 99), seed=st.integers(0, 99))
def test_dropping_a_sample_moves_no_other(n: int, dropped: int, seed: int) -> None:
    weights = 1.0 + np.arange(n)
    kept = np.delete(np.arange(n), dropped % n)
    order = weighted_order(keys(n), weights, seed=seed)
    assert kept[weighted_order(keys(n)[kept], weights[kept], seed=seed)].tolist() == [
        i for i in order if i != dropped % n
    ]


def test_equal_race_times_fall_to_the_lower_position() -> None:
    assert weighted_order(np.zeros(1000, dtype=np.uint64), seed=3).tolist() == list(range(1000))


def test_first_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    first = np.array([weighted_order(keys(4), weights, seed=seed)[0] for seed in range(4000)])
    share = np.bincount(first, minlength=4) / len(first)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=4 * np.sqrt(0.25 / len(first)))


def test_second_draw_follows_the_weights_that_remain() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    draws = np.array([weighted_order(keys(3), weights, seed=seed)[:2] for seed in range(4000)])
    after_last = draws[draws[:, 0] == 2, 1]
    assert abs((after_last == 1).mean() - 2 / 3) < 4 * np.sqrt(0.25 / len(after_last))


def test_weight_zero_comes_last_in_random_order() -> None:
    weights = np.array([0.0] * 20 + [1.0] * 20)
    tails = {tuple(weighted_order(keys(40), weights, seed=seed)[20:].tolist()) for seed in range(5)}
    assert all(set(tail) == set(range(20)) for tail in tails)
    assert len(tails) == 5


@settings(max_examples=300)
@given(data=st.data(), n=st.integers(0, 120), batch_size=st.integers(1, 17), n_labels=st.integers(1, 40))
def test_dealt_batches_hold_their_share_of_each_stratum(
    data: st.DataObject, n: int, batch_size: int, n_labels: int
) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, n_labels - 1), min_size=n, max_size=n)), dtype=np.int64)
    order = weighted_order(keys(n), seed=n)
    dealt = deal(order, labels[order], batch_size)
    assert sorted(dealt.tolist()) == list(range(n))
    full, all_batches = n // batch_size, -(-n // batch_size)
    counts = np.bincount(labels, minlength=n_labels)
    for b in range(all_batches):
        batch = np.bincount(labels[dealt[b * batch_size : (b + 1) * batch_size]], minlength=n_labels)
        if full:
            assert (batch <= -(-counts // full)).all()
        if b < full:
            assert (batch >= counts // all_batches).all()


def test_near_duplicates_never_share_a_batch() -> None:
    clusters = np.repeat(np.arange(250), 4)
    order = weighted_order(keys(1000), seed=0)
    batches = clusters[deal(order, clusters[order], 16)][: 1000 // 16 * 16].reshape(-1, 16)
    assert all(len(set(batch)) == 16 for batch in batches.tolist())


def test_groups_repeat_like_the_documented_picture() -> None:
    groups = Groups(mini_repeat_count=2, batch_size=3, repeat_count=2)
    assert list(groups.repeat([4, 3, 0, 1, 2, 6, 5])) == [4, 4, 3, 3, 0, 0] * 2 + [1, 1, 2, 2, 6, 6] * 2


@given(n=SIZES, m=st.integers(1, 5), b=st.integers(1, 9), r=st.integers(1, 4))
def test_length_of_groups_is_what_they_yield(n: int, m: int, b: int, r: int) -> None:
    groups = Groups(m, b, r)
    assert len(list(groups.repeat(range(n)))) == groups.length(n)


def test_groups_draw_no_further_than_the_batch_they_yield() -> None:
    drawn: list[int] = []

    def draws():
        for i in range(100):
            drawn.append(i)
            yield i

    indices = Groups(2, 3, 2).repeat(draws())
    for _ in range(12):
        next(indices)
    assert drawn == [0, 1, 2]


def test_ids_and_orders_are_the_same_on_every_machine() -> None:
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ("a", "ä")]
    assert id_keys(["a", "ä"]).tolist() == [int.from_bytes(digest, "little") for digest in digests]
    assert weighted_order(keys(8), seed=1, epoch=2).tolist() == GOLDEN


def test_an_order_takes_at_most_25_bytes_a_sample() -> None:
    n = 1_000_000
    many = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    weights = np.ones(n)
    tracemalloc.start()
    weighted_order(many, weights, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 25 * n
