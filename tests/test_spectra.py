"""Spectra from factors against dense float64 SVD, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import spectra
from selector.errors import ConfigError, SelectorError
from selector.spectra.factors import check_factors
from selector.spectra.linalg import congruence, semidefinite_factor

torch.set_num_threads(1)
PRECISIONS = ("fast", "high", "reference", "auto")
# Worst relative error of the nuclear norm and of the effective rank on well-conditioned input.
TOLERANCE = {"fast": (1e-3, 1e-2), "high": (1e-5, 1e-4), "auto": (1e-5, 1e-4), "reference": (1e-8, 1e-7)}


def dense(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The oracle: the gradient in float64 and its SVD."""
    rank = min(x.shape[1], x.shape[2], delta.shape[2])
    return torch.linalg.svdvals(delta.double().mT @ x.double())[:, :rank]


def errors(sigma: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    def worst(measure):
        wanted = measure(oracle)
        zero = oracle.sum(-1) == 0
        assert torch.equal(measure(sigma).isnan() | (measure(sigma) == 0), zero)
        return ((measure(sigma) - wanted) / wanted)[~zero].abs().max().item() if (~zero).any() else 0.0

    return worst(spectra.nuclear_norm), worst(spectra.effective_rank)


def factors(n: int, t: int, i: int, o: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, t, i, generator=generator), torch.randn(n, t, o, generator=generator)


def spoil(kind: str, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shapes that real factors take."""
    t = x.shape[1]
    if kind == "padding right":
        delta[:, t // 2 :] = 0
    elif kind == "padding left":
        delta[:, : t // 2] = 0
    elif kind == "last token":
        delta[:, -1] = 0
    elif kind == "ragged":
        for n in range(len(x)):
            delta[n, max(1, t - 2 * n) :] = 0
    elif kind == "rank deficient":
        delta = delta[:, :, :1] @ torch.ones(1, delta.shape[2]) + 0.5 * delta[:, :, -1:] @ delta[:, :1]
    elif kind == "repeated tokens":
        x = x[:, torch.arange(t) % max(t // 3, 1)]
    elif kind == "common mode":
        x, delta = x + 30, delta - delta.mean(1, keepdim=True)
    elif kind == "small":
        x, delta = x * 1e-12, delta * 1e-15
    elif kind == "huge":
        x, delta = x * 1e12, delta * 1e15
    return x, delta


KINDS = (
    "plain",
    "padding right",
    "padding left",
    "last token",
    "ragged",
    "rank deficient",
    "repeated tokens",
    "common mode",
    "small",
    "huge",
)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3), t=st.integers(1, 40), i=st.integers(1, 40), o=st.integers(1, 40),
    kind=st.sampled_from(KINDS), precision=st.sampled_from(("high", "reference", "auto")), seed=st.integers(0, 99),
)  # fmt: skip
def test_agrees_with_dense_svd(n, t, i, o, kind, precision, seed):
    x, delta = spoil(kind, *factors(n, t, i, o, seed))
    if kind == "common mode" and t == 1:
        return  # the centred delta is rounding noise
    nuclear, rank = errors(spectra.singular_values(x, delta, precision), dense(x, delta))
    assert nuclear <= 1e-5
    assert rank <= 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "common mode"])
@pytest.mark.parametrize("shape", [(2, 48, 96, 64), (2, 96, 64, 48)])
def test_every_precision_meets_its_tolerance(precision, kind, shape):
    x, delta = spoil(kind, *factors(*shape))
    nuclear, rank = errors(spectra.singular_values(x, delta, precision), dense(x, delta))
    # Squaring lifts the zeros of an exactly singular product to the floor, which a small effective rank shows most.
    slack = 10 if precision == "fast" and kind in ("rank deficient", "repeated tokens") else 1
    assert nuclear <= slack * TOLERANCE[precision][0]
    assert rank <= slack * TOLERANCE[precision][1]


@pytest.mark.parametrize("precision", ["fast", "high", "reference"])
@pytest.mark.parametrize("kind", ["plain", "common mode", "rank deficient"])
@pytest.mark.parametrize("shape", [(2, 48, 96, 64), (2, 96, 64, 48)])
def test_no_singular_value_is_off_by_more_than_the_stated_floor(precision, kind, shape):
    x, delta = spoil(kind, *factors(*shape))
    (core,) = spectra.reduce_factors(x, [delta], precision)
    error = (spectra.solve([core])[0] - dense(x, delta)).abs()
    assert (error <= 8 * core.floor[:, None] + 1e-6 * (precision == "fast") * dense(x, delta)).all()


def test_auto_escalates_only_the_samples_that_need_it():
    plain, (x, delta) = factors(1, 48, 96, 64), spoil("common mode", *factors(1, 48, 96, 64, seed=1))
    x, delta = torch.cat([plain[0], x]).bfloat16(), torch.cat([plain[1], delta]).bfloat16()
    (core,) = spectra.reduce_factors(x, [delta])
    assert core.escalated[0].tolist() == [1]
    assert core.route == "fast: 48x48 Gram, 1 in high"
    nuclear, rank = errors(spectra.solve([core])[0], dense(x, delta))
    assert nuclear <= 1e-3
    assert rank <= 1e-2


@pytest.mark.parametrize("outputs", [320, 256], ids=["tokens fit", "more tokens than outputs"])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_fast_keeps_its_bound_where_nearly_all_directions_are_noise(outputs, heads):
    """The v projection of a sample with a single loss token: 300 tokens, one direction for each head, and inputs with a common part."""
    generator = torch.Generator().manual_seed(heads)
    attention = torch.softmax(3 * torch.randn(2, 300, heads, 1, generator=generator), 1)
    delta = (attention * torch.randn(2, 1, heads, outputs // heads, generator=generator)).flatten(2)
    x = torch.randn(2, 300, 352, generator=generator) + 3 * torch.randn(2, 1, 352, generator=generator)
    plain = factors(1, 300, 352, outputs)
    x, delta = torch.cat([x, plain[0]]), torch.cat([delta, plain[1]])  # a batch mate that needs nothing
    nuclear, rank = errors(spectra.singular_values(x, delta, "fast"), dense(x, delta))
    assert nuclear <= TOLERANCE["fast"][0]
    assert rank <= TOLERANCE["fast"][1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_invariance(precision):
    x, delta = factors(2, 20, 48, 32)
    alone = spectra.singular_values(x, delta, precision)
    noise = torch.full((2, 7, 48), torch.nan)  # a padding row of x may hold anything
    padded = spectra.singular_values(
        torch.cat([noise, x, noise], 1), torch.nn.functional.pad(delta, (0, 0, 7, 7)), precision
    )
    assert padded.shape == (2, 32)
    torch.testing.assert_close(padded[:, :20], alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("t", [20, 60])
def test_batch_mate_invariance(precision, t):
    x, delta = factors(4, t, 48, 32)
    x[3] *= 1e6
    together = spectra.singular_values(x, delta, precision)
    alone = torch.cat([spectra.singular_values(x[n : n + 1], delta[n : n + 1], precision) for n in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("t", [20, 60])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_non_finite_sample_is_nan_and_poisons_no_other(precision, t, bad, where):
    x, delta = factors(3, t, 48, 32)
    clean = spectra.singular_values(x, delta, precision)
    (x, delta)[where][1, 3, 5] = bad
    sigma = spectra.singular_values(x, delta, precision)
    assert sigma[1].isnan().all()
    torch.testing.assert_close(sigma[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(2, 6, 9, 8), (2, 30, 9, 8)])
def test_zero_deltas_give_a_zero_spectrum(precision, shape):
    x, delta = factors(*shape)
    sigma = spectra.singular_values(x, torch.zeros_like(delta), precision)
    assert torch.equal(sigma, torch.zeros(2, min(shape[1:]), dtype=torch.float64))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (0, 20, 9, 8), (2, 0, 9, 8)])
def test_empty_batches(precision, shape):
    assert spectra.singular_values(*factors(*shape), precision).shape == (shape[0], min(shape[1:]))


def test_projections_share_the_gram_of_x_and_layers_are_solved_together():
    x, q = factors(3, 16, 32, 32)
    k = factors(3, 16, 32, 8, seed=1)[1]  # T > O: another route
    v = factors(3, 16, 32, 24, seed=2)[1]
    cores = spectra.reduce_factors(x, [q, k, v], "fast")
    assert cores[0].left is cores[2].left
    assert cores[1].left is None
    other = spectra.reduce_factors(*(lambda x, d: (x, [d]))(*factors(3, 16, 40, 40, seed=3)), "fast")
    for sigma, delta in zip(spectra.solve(cores + other, memory=1), (q, k, v), strict=False):
        torch.testing.assert_close(sigma, dense(x, delta), rtol=2e-3, atol=1e-3)
    for one, all_ in zip(spectra.solve(cores + other, memory=1), spectra.solve(cores + other), strict=True):
        torch.testing.assert_close(one, all_, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [0.0, 1e-30, torch.nan])
def test_a_projection_out_of_range_leaves_those_that_share_its_input_alone(precision, bad):
    x, q = factors(2, 16, 32, 32)
    k = factors(2, 16, 32, 24, seed=1)[1]
    k[0] *= bad
    found = spectra.solve(spectra.reduce_factors(x, [q, k], precision))
    alone = spectra.singular_values(x, q, precision)
    torch.testing.assert_close(found[0], alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][1], spectra.singular_values(x, k, precision)[1], rtol=1e-5, atol=0)
    if bad == 1e-30:
        torch.testing.assert_close(found[1][0], dense(x, k)[0], rtol=2e-3, atol=0)


def test_core_reports_the_frobenius_norm():
    x, delta = factors(2, 16, 32, 24)
    for precision in PRECISIONS:
        (core,) = spectra.reduce_factors(x, [delta], precision)
        torch.testing.assert_close(core.frobenius, spectra.frobenius_norm(dense(x, delta)), rtol=1e-5, atol=0)


def test_unknown_precision_and_misfit_factors_are_refused():
    x, delta = factors(2, 6, 9, 8)
    with pytest.raises(ConfigError, match="did you mean 'high'"):
        check_factors(x, [delta], "higher")
    with pytest.raises(SelectorError, match=r"x \[2, 6, 9\] and delta \[2, 5, 8\]"):
        check_factors(x, [delta[:, :5]], "high")


def test_measures_of_a_known_spectrum():
    sigma = torch.tensor([[3.0, 3.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), equal_nan=True)  # noqa: E731
    nan = float("nan")
    close(spectra.effective_rank(sigma), [2.0, 1.0, nan, nan])
    close(spectra.nuclear_norm(sigma), [6.0, 4.0, 0.0, nan])
    close(spectra.frobenius_norm(sigma), [18**0.5, 4.0, 0.0, nan])
    close(spectra.spectral_norm(sigma), [3.0, 4.0, 0.0, nan])
    close(spectra.stable_rank(sigma), [2.0, 1.0, nan, nan])
    assert sorted(spectra.measures) == [
        "effective_rank",
        "frobenius_norm",
        "nuclear_norm",
        "spectral_norm",
        "stable_rank",
    ]


@given(st.floats(1e-20, 1e20), st.integers(1, 30))
def test_ranks_do_not_depend_on_scale(scale, size):
    sigma = torch.rand(1, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.01
    for measure in (spectra.effective_rank, spectra.stable_rank):
        torch.testing.assert_close(measure(sigma * scale), measure(sigma), rtol=1e-9, atol=0)
        assert 1 <= measure(sigma).item() <= size + 1e-9


def test_measures_of_an_empty_spectrum():
    empty = torch.empty(2, 0)
    for name in spectra.measures:
        value = spectra.measures[name](empty)
        assert value.shape == (2,)
        assert value.isnan().all() if name.endswith("rank") else (value == 0).all()


def test_factor_of_a_gram_that_rounding_made_indefinite_keeps_its_large_directions():
    """Too far below zero for any jitter, and with empty rows: the factor then comes from eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 6, generator=generator, dtype=torch.float64)
    x[:, 30:] = 0
    noise = torch.randn(2, 40, 40, generator=generator, dtype=torch.float64)
    noise[:, 30:], noise[:, :, 30:] = 0, 0
    gram = x @ x.mT + 1e-4 * (noise + noise.mT)
    assert (torch.linalg.eigvalsh(gram)[:, 0] < -1e-4).all()
    factor = semidefinite_factor(gram.float())
    error = torch.linalg.matrix_norm(factor @ factor.mT - gram) / torch.linalg.matrix_norm(gram)
    assert (error < 1e-3).all()
    assert (factor[:, 30:] == 0).all()


# what is left for later ----------------------------------------------------------------------------------------------


def hard(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of which `auto` needs a second reduction: a common part of x that delta cancels."""
    x, delta = spoil("common mode", *factors(3, 24, 40, 32))
    return x.to(dtype), delta.to(dtype)


def test_reductions_may_be_finished_later_and_in_any_order():
    wanted = [spectra.reduce_factors(x, [delta]) for x, delta in (hard(), factors(2, 8, 12, 10))]
    begun = [spectra.begin_reduction(x, [delta]) for x, delta in (hard(), factors(2, 8, 12, 10))]
    found = [finish() for finish in reversed(begun)][::-1]
    assert wanted[0][0].escalated is not None
    for one, other in zip(found, wanted, strict=True):
        assert [core.route for core in one] == [core.route for core in other]
        torch.testing.assert_close(spectra.solve(one), spectra.solve(other), rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("past_torch", [False, True])
def test_factors_that_are_overwritten_before_a_second_reduction_are_refused(which, past_torch):
    tensors = hard()
    finish = spectra.begin_reduction(tensors[0], [tensors[1]])
    if past_torch:  # as a kernel that writes to a pointer: torch counts nothing
        tensors[which].view(torch.int16).numpy()[...] = np.random.default_rng(0).integers(
            15_000, 16_800, tensors[which].shape
        )
    else:
        tensors[which].mul_(-1)
    with pytest.raises(SelectorError, match="overwritten before they could be measured"):
        finish()


def test_factors_that_need_no_second_reduction_may_be_overwritten():
    x, delta = (tensor.bfloat16() for tensor in factors(2, 8, 30, 20))
    wanted = spectra.singular_values(x, delta)
    finish = spectra.begin_reduction(x, [delta])
    x.zero_()
    torch.testing.assert_close(spectra.solve(finish())[0], wanted)


@pytest.mark.parametrize("n", [0, 1, 100, 460, 700])
def test_products_by_blocks_are_those_of_whole_matrices(n):
    lower, other = factors(2, n, n, n)
    lower, symmetric = lower[:, :, :n].tril().double(), (other[:, :, :n] + other[:, :, :n].mT).double()
    torch.testing.assert_close(congruence(lower, symmetric).triu(), (lower.mT @ symmetric @ lower).triu())


@pytest.mark.parametrize("precision", ["fast", "high", "reference", "auto"])
@pytest.mark.parametrize("tokens", [10, 40])
def test_factors_that_require_gradients_give_values_without_a_graph(precision, tokens):
    x, delta = torch.randn(2, tokens, 30), torch.randn(2, tokens, 20)
    plain = spectra.singular_values(x, delta, precision)
    found = spectra.singular_values(x.requires_grad_(), delta.requires_grad_(), precision)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_row_of_a_matrix_is_one_of_its_factor(dtype):
    x = torch.randn(2, 6, 9, dtype=dtype)
    x[0, 3] = 0
    x[1, 5] = 0
    lower = semidefinite_factor(x @ x.mT)
    assert not lower[0, 3].any()
    assert not lower[1, 5].any()
    torch.testing.assert_close(lower @ lower.mT, (x @ x.mT).double(), rtol=1e-5, atol=1e-5)
