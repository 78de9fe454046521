"""Two-stage tridiagonalization against LAPACK, in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.spectra import band
from selector.spectra.band import reduce_to_band, tridiagonalize_by_band

KINDS = ("random", "power", "singular", "zero", "repeated", "diagonal", "banded", "padded", "graded")


def symmetric(n: int, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    q, k = torch.linalg.qr(x).Q, torch.arange(1, n + 1, dtype=torch.float64)
    matrices = {
        "random": x + x.mT,
        "power": (q * k**-2) @ q.mT,
        "singular": x[:, :, :5] @ x[:, :, :5].mT,
        "zero": 0 * x,
        "repeated": (q * (k % 3)) @ q.mT,
        "diagonal": torch.diag_embed(x[:, 0]),
        "banded": (x + x.mT).triu(-3).tril(3),
        "padded": (x @ x.mT) * (k <= n // 3) * (k <= n // 3)[:, None],
        "graded": (x @ x.mT) * torch.logspace(0, -13, n).double() * torch.logspace(0, -13, n).double()[:, None],
    }[kind]
    return matrices / matrices.abs().amax().clamp_min(1e-3)


def eigenvalues(diagonal: torch.Tensor, off_diagonal: torch.Tensor) -> torch.Tensor:
    sides = torch.diag_embed(off_diagonal[:, :-1].double(), 1)
    return torch.linalg.eigvalsh(torch.diag_embed(diagonal.double()) + sides + sides.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "width"), [(64, 32), (96, 32), (64, 16), (32, 32), (48, 8)])
def test_agrees_with_lapack(n, width, kind, dtype):
    matrices = symmetric(n, kind)
    found = eigenvalues(*tridiagonalize_by_band(matrices.to(dtype, copy=True), width))
    error = (found - torch.linalg.eigvalsh(matrices)).abs().max()
    assert error <= 60 * torch.finfo(dtype).eps * matrices.abs().max() * n**0.5


@settings(max_examples=15, deadline=None)
@given(blocks=st.integers(1, 6), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_a_band_has_the_eigenvalues_of_the_matrix(blocks, kind, seed):
    matrices = symmetric(8 * blocks, kind, seed)
    stored = reduce_to_band(matrices.clone(), 8)
    assert (stored[:, :, 9:] == 0).all()
    dense = torch.zeros_like(matrices)
    for d in range(min(9, 8 * blocks)):
        dense += torch.diag_embed(stored[:, : 8 * blocks - d, d], d)
    dense = dense + dense.triu(1).mT
    torch.testing.assert_close(
        torch.linalg.eigvalsh(dense), torch.linalg.eigvalsh(matrices), rtol=0, atol=1e-12 * 8 * blocks
    )


def test_a_chase_that_goes_wrong_gives_no_eigenvalues(monkeypatch):
    def faulty(stored: torch.Tensor) -> None:
        chase(stored)
        stored[1, 5, 0] += 0.1

    chase = band.chase_bulges
    monkeypatch.setattr(band, "chase_bulges", faulty)
    diagonal, _ = tridiagonalize_by_band(symmetric(64, "random"))
    assert diagonal[0].isfinite().all()
    assert diagonal[1].isnan().all()
