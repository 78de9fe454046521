"""Samplers draw what they promise: permutations, coverage, curricula, learnable prompts, and the same again after a resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.errors import ConfigError, SelectionError
from selector.sampling import (
    CURRICULA,
    AdaptiveSampler,
    FocusSignal,
    RewardSignal,
    SelectionSampler,
    TapSignal,
    load_state,
    save_state,
)
from selector.selection import Selection


def selection(n: int, weights: np.ndarray | None = None, prefix: str = "s") -> Selection:
    """[n] samples s0000, s0001, ... at rows 0, 2, 4, ... with rising scores."""
    return Selection(
        ids=np.array([f"{prefix}{i:04d}" for i in range(n)]), rows=2 * np.arange(n), weights=np.ones(n) if weights is None else weights,
        scores=np.arange(n, dtype=float), n_tokens=np.ones(n, dtype=np.int64), reasons=np.full(n, ""),
    )  # fmt: skip


def epoch(sampler: SelectionSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


@given(
    n=st.integers(1, 150), curriculum=st.sampled_from([None, *CURRICULA]), stratified=st.booleans(),
    batch_size=st.integers(1, 20), number=st.integers(0, 3),
)  # fmt: skip
def test_every_epoch_draws_each_sample_once(
    n: int, curriculum: str | None, stratified: bool, batch_size: int, number: int
) -> None:
    strata = np.arange(n) % 3 if stratified else None
    sampler = SelectionSampler(selection(n), curriculum=curriculum, strata=strata, batch_size=batch_size)
    drawn = epoch(sampler, number)
    assert sorted(drawn) == list(range(0, 2 * n, 2))
    assert len(drawn) == len(sampler)


def test_setting_the_same_epoch_again_changes_nothing() -> None:
    sampler = SelectionSampler(selection(20))
    first = epoch(sampler, 3)
    sampler.set_epoch(3)
    assert list(sampler) == list(sampler) == first != epoch(sampler, 4)


def test_where_a_row_lies_changes_nothing_but_its_number() -> None:
    picked = selection(20)
    names = np.random.default_rng(0).permutation([*picked.ids, "other"]).tolist()
    moved = [names[row] for row in SelectionSampler(picked, dataset_ids=names)]
    assert moved == [picked.ids[row // 2] for row in SelectionSampler(picked)]


def test_samples_that_the_data_set_lacks_are_named() -> None:
    sampler = SelectionSampler(selection(4), dataset_ids=["s0003", "x", "s0000"])
    assert sampler.missing == ("s0001", "s0002")
    assert sorted(sampler) == [0, 2]
    with pytest.raises(SelectionError, match="no sample of the selection"):
        SelectionSampler(selection(4), dataset_ids=["x"])
    with pytest.raises(SelectionError, match="names a sample twice"):
        SelectionSampler(selection(4), dataset_ids=["s0000", "s0000"])


@pytest.mark.parametrize("name", list(CURRICULA))
def test_a_curriculum_moves_through_the_scores(name: str) -> None:
    order = np.array(epoch(SelectionSampler(selection(960), curriculum=name, batch_size=4), 0))
    first, last = order[:240].mean(), order[-240:].mean()
    assert first > last + 100 if name == "high-to-low" else last > first + 100


def test_a_curriculum_without_scores_is_refused() -> None:
    unscored = selection(4)
    unscored.scores[2] = np.nan
    with pytest.raises(SelectionError, match="a curriculum needs a score for every sample"):
        SelectionSampler(unscored, curriculum="low-to-high")
    with pytest.raises(ConfigError, match="did you mean 'low-to-high'"):
        SelectionSampler(selection(4), curriculum="low-to-hihg")


def adaptive(
    n: int, batch_size: int = 8, coverage: float = 0.25, signal: RewardSignal | FocusSignal | None = None
) -> AdaptiveSampler:
    return AdaptiveSampler(selection(n), signal or RewardSignal(), coverage=coverage, batch_size=batch_size)


@given(n=st.integers(8, 80), coverage=st.floats(0.01, 1.0), batch_size=st.integers(1, 8))
def test_no_sample_waits_longer_than_stated(n: int, coverage: float, batch_size: int) -> None:
    signal = RewardSignal(richness=20.0)  # nearly all weight on few samples
    sampler = adaptive(n, batch_size, coverage, signal)
    bound = -(-n // max(1, int(coverage * batch_size)))
    last = np.zeros(n, dtype=int)
    for number in range(1, min(3 * bound, 60)):
        last[sampler._batch(batch_size)] = number
        assert number - last.min() <= bound


def test_a_batch_never_holds_a_sample_twice() -> None:
    sampler = adaptive(12, 8)
    assert all(len(set(sampler._batch(8).tolist())) == 8 for _ in range(50))


def test_adaptive_draws_follow_the_rewards() -> None:
    sampler = adaptive(100, 10, 0.1, RewardSignal(richness=0.0))
    hopeless, certain, open_ = np.arange(40), np.arange(40, 80), np.arange(80, 100)
    for _ in range(10):
        sampler.signal.observe(np.repeat(hopeless, 4), np.zeros(160))
        sampler.signal.observe(np.repeat(certain, 4), np.ones(160))
        sampler.signal.observe(np.repeat(open_, 4), np.tile([0.0, 1.0], 40))
    drawn = np.concatenate([sampler._batch(10) for _ in range(100)])
    share = np.isin(drawn, open_).mean()
    assert share > 0.5, "the weights give 0.6, a uniform draw gives 0.2"
    assert set(sampler.signal.unsolved().tolist()) == set(hopeless.tolist())


def test_pass_rates_start_at_one_half_and_forget() -> None:
    signal = RewardSignal(forget=0.5)
    signal.bind(np.array(["a", "b"]), np.zeros(2))
    assert signal.pass_rates().tolist() == [0.5, 0.5]
    for _ in range(20):
        signal.observe(np.zeros(8, dtype=int), np.zeros(8))
    low = signal.pass_rates()[0]
    for _ in range(3):
        signal.observe(np.zeros(8, dtype=int), np.array([1.0] * 7 + [np.nan]))
    assert low < 0.1
    assert signal.pass_rates()[0] > 0.7
    assert signal.pass_rates()[1] == 0.5


def test_zero_variance_groups_are_counted() -> None:
    signal = RewardSignal()
    signal.bind(np.array(["a", "b", "c"]), np.zeros(3))
    signal.observe(np.array([0, 0, 1, 1, 2, 2]), np.array([0.0, 0, 1, 1, 0, 1]))
    assert signal.metrics()["uniform_groups"] == pytest.approx(2 / 3)


def test_rewards_that_know_more_than_passed_and_failed_are_told_apart() -> None:
    """No completion passes, yet one group differs in its rewards and has a gradient."""
    signal = RewardSignal(learnability="variance", richness=0.0, forget=0.5)
    signal.bind(np.array(["a", "b", "c"]), np.zeros(3))
    positions, rewards = np.repeat([0, 1], 4), np.array([0.1, 0.4, 0.1, 0.4, 0.3, 0.3, 0.3, np.nan])
    signal.observe(positions, rewards)
    assert signal.metrics()["uniform_groups"] == 0.5
    np.testing.assert_allclose(signal.reward_variances(), [0.15**2, 0.0, np.nan], atol=1e-12)
    untried_first = signal.weights()
    assert untried_first[2] == untried_first.max()
    for _ in range(6):
        signal.observe(positions, rewards)
    weights = signal.weights()
    assert weights[0] > 3 * weights[1]


def test_prompts_without_success_are_routed_once_and_left_to_coverage() -> None:
    routed: list[list[str]] = []
    sampler = adaptive(12, 4, 0.25, RewardSignal(hopeless_after=8, on_unsolved=routed.append))
    hopeless = np.repeat([3, 5], 4)
    for _ in range(4):
        sampler.signal.observe(hopeless, np.zeros(8))
    assert routed == [["s0003", "s0005"]]
    assert np.flatnonzero(sampler.weights() == 0).tolist() == [3, 5]
    drawn = np.concatenate([sampler._batch(4) for _ in range(12)])
    assert {3, 5} <= set(drawn.tolist()), "they come again, so that a better model may solve them"
    sampler.signal.observe(np.array([3]), np.ones(1))
    assert sampler.weights()[3] > 0


def test_live_spectra_take_the_place_of_scores() -> None:
    spectra = TapSignal(control="none")
    signal = RewardSignal(spectra=spectra)
    sampler = adaptive(4, 2, signal=signal)
    assert sampler.weights().argmax() == 3
    spectra.observe(np.arange(4), np.array([9.0, 1.0, 2.0, 3.0]), np.ones(4, dtype=np.int64), step=0)
    assert sampler.weights().argmax() == 0
    again = adaptive(4, 2, signal=RewardSignal(spectra=TapSignal(control="none")))
    assert again.identity == sampler.identity != adaptive(4, 2).identity
    again.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(again.weights(), sampler.weights())
    assert "live_effective_rank" in again.metrics(0, 0)


@given(parts=st.lists(st.integers(0, 3), min_size=12, max_size=12), visits=st.integers(1, 3))
def test_measurements_of_a_visit_are_averaged_however_it_is_split(parts: list[int], visits: int) -> None:
    """Twelve rollouts of four prompts, spread over up to four micro-steps; a later visit takes the place of an earlier."""
    rng = np.random.default_rng(0)
    whole, split = TapSignal(), TapSignal()
    for signal in (whole, split):
        signal.bind(np.array(["a", "b", "c", "d"]), np.zeros(4))
    positions, part = np.arange(12) % 4, np.array(parts)
    for visit in range(visits):
        values, tokens = rng.exponential(size=12), rng.integers(1, 9, 12)
        values[5] = np.nan
        whole.observe(positions, values, tokens, step=0, visit=visit)
        for step in range(4):
            mine = part == step
            split.observe(positions[mine], values[mine], tokens[mine], step=step, visit=visit)
        np.testing.assert_allclose(split.values, whole.values)
        np.testing.assert_allclose(split.weights(), whole.weights())


def test_a_signal_with_other_settings_is_refused(tmp_path: Path) -> None:
    save_state(adaptive(8, signal=RewardSignal(richness=0.5)), tmp_path)
    with pytest.raises(SelectionError, match=r"signal\.richness = 0.7"):
        load_state(adaptive(8, signal=RewardSignal(richness=0.7)), tmp_path)


def test_the_focus_moves_with_success_and_stays_within_bounds() -> None:
    angles = {f"s{i:04d}": float(100 - i) for i in range(100)}
    signal = FocusSignal(angles, step=0.1)
    sampler = adaptive(100, 10, 0.1, signal)
    first = sampler.weights().argmax()
    for _ in range(100):
        signal.observe(np.array([99, 50, 0]), np.ones(3))
    assert first == 0
    assert signal.center == 1.0
    assert sampler.weights().argmax() == 99
    for _ in range(100):
        signal.observe(np.array([99]), np.zeros(1))
    assert signal.center == 0.0


def test_angles_and_scores_multiply_into_the_weights() -> None:
    signal = RewardSignal(richness=1.0, angles={"a": 1.0, "b": 3.0, "c": 2.0}, concentration=1.0)
    signal.bind(np.array(["a", "b", "c"]), np.array([1.0, 2.0, 3.0]))
    ranks = np.array([1, 3, 5]) / 6
    np.testing.assert_allclose(signal.weights(), 0.25 * ranks * ranks[[0, 2, 1]])


@given(cut=st.integers(0, 39), ahead=st.integers(0, 12), number=st.integers(0, 1))
def test_an_adaptive_sampler_resumes_exactly(
    tmp_path_factory: pytest.TempPathFactory, cut: int, ahead: int, number: int
) -> None:
    """Rewards arrive after every draw; the loader has fetched `ahead` draws more than were trained on at the checkpoint."""

    def observe(sampler: AdaptiveSampler, row: int) -> None:
        sampler.signal.observe(np.full(4, row // 2), np.random.default_rng(row).integers(0, 2, 4).astype(float))

    def run(sampler: AdaptiveSampler, first: int, folder: Path | None) -> list[int]:
        sampler.set_epoch(number)
        draws, trained, fetched = iter(sampler), [], []
        for step in range(40):
            fetched += list(islice(draws, max(0, min(step + 1 + ahead, 40) - len(fetched))))
            if step >= first:
                trained.append(fetched[step])
                observe(sampler, fetched[step])
            if step == cut and folder is not None:
                save_state(sampler, folder)
        return trained

    folder = tmp_path_factory.mktemp("checkpoint")
    whole = run(adaptive(40), 0, folder)
    resumed = adaptive(40)
    assert load_state(resumed, folder)
    assert run(resumed, cut + 1, None) == whole[cut + 1 :]


def test_a_finished_epoch_is_not_drawn_again(tmp_path: Path) -> None:
    first, resumed = adaptive(16), adaptive(16)
    epoch(first, 0)
    save_state(first, tmp_path)
    load_state(resumed, tmp_path)
    assert epoch(resumed, 1) == epoch(first, 1)


def test_a_state_of_another_run_is_refused_with_both_values(tmp_path: Path) -> None:
    save_state(SelectionSampler(selection(8), seed=1), tmp_path)
    assert load_state(SelectionSampler(selection(8), seed=1), tmp_path)
    with pytest.raises(SelectionError, match=r"(?s)got: +seed = 2\n.*allowed: +seed = 1\n"):
        load_state(SelectionSampler(selection(8), seed=2), tmp_path)
    with pytest.raises(SelectionError, match="samples ="):
        load_state(SelectionSampler(selection(8, prefix="t"), seed=1), tmp_path)


def test_a_missing_state_is_reported_and_a_damaged_one_refused(tmp_path: Path) -> None:
    sampler = SelectionSampler(selection(8))
    assert not load_state(sampler, tmp_path)
    save_state(sampler, tmp_path)
    path = tmp_path / "selector_sampler.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SelectionError, match="is no sampler state"):
        load_state(sampler, tmp_path)


def test_metrics_describe_what_was_trained_on() -> None:
    weights = np.array([1.0] * 9 + [3.0])
    sampler = SelectionSampler(selection(10, weights), strata=np.array(["a"] * 5 + ["b"] * 5), batch_size=2)
    list(sampler)
    figures = sampler.metrics(0, 4)
    assert figures["effective_samples"] == pytest.approx(12**2 / 18)
    assert figures["coverage"] == 0.4
    assert figures["mean_score"] == sampler.scores[sampler.drawn()[:4]].mean()
    assert figures["share/a"] + figures["share/b"] == 1
    mixed = SelectionSampler(selection(10, weights), sources=np.array(["x"] * 9 + ["y"]))
    list(mixed)
    assert mixed.metrics(0, 10)["share/x"] == 0.9


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="coverage is a share"):
        adaptive(8, coverage=0.0)
    with pytest.raises(ConfigError, match="leave no room for strata or a curriculum"):
        AdaptiveSampler(selection(8), RewardSignal(), curriculum="low-to-high")
    with pytest.raises(ConfigError, match="forget is a factor"):
        RewardSignal(forget=2.0)
    unscored = selection(4)
    unscored.scores[0] = np.nan
    with pytest.raises(ConfigError, match="weights need the scores of every sample"):
        AdaptiveSampler(unscored, RewardSignal())
