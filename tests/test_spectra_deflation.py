"""Spectra of matrices that few directions dominate."""

from __future__ import annotations

import pytest
import torch

from selector.spectra import cores
from selector.spectra.deflation import DIRECTIONS, deflate


def dominated(n: int, decay: float, common: float, seed: int = 0) -> torch.Tensor:
    """Eigenvalues common², then k^-2 decay."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, n + 1, dtype=torch.float64) ** (-2 * decay)
    values[:3] += common**2
    return (q * values) @ q.mT


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("common", [0.0, 1e2, 1e3, 1e5])
def test_parts_together_have_the_spectrum(decay, common):
    matrices = dominated(96, decay, common)
    largest, rest, apart = deflate(matrices)
    assert apart.all() == (common * 16**decay < 1e4)  # what is too far below the largest is left to float64
    if not apart.all():
        return
    parts = torch.cat([largest, torch.linalg.eigvalsh(rest)[:, DIRECTIONS:]], -1).sort().values.clamp_min(0).sqrt()
    wanted = torch.linalg.eigvalsh(matrices).clamp_min(0).sqrt()
    torch.testing.assert_close(parts.sum(-1), wanted.sum(-1), rtol=2e-5, atol=0)
    torch.testing.assert_close(parts, wanted, rtol=5e-3, atol=1e-6 * wanted.max().item())


@pytest.mark.parametrize("rank", [0, 5])
def test_matrices_of_fewer_directions_are_left_to_float64(rank):
    x = torch.randn(2, 40, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest, rest, apart = deflate(x @ x.mT)
    assert largest.isfinite().all()
    assert rest.isfinite().all()
    assert rank == 0 or not apart.any()


def test_a_noisy_spectrum_is_right_without_float64(monkeypatch):
    """As on a GPU: float32 alone misses the nuclear norm by more than it does without the largest directions."""
    matrices = dominated(256, 0.5, 300.0)
    wanted = torch.linalg.eigvalsh(matrices).clamp_min(0).sqrt().flip(-1)
    monkeypatch.setattr(cores, "uses_kernels", lambda _: True)
    seen = []

    def solver(squares, dtype):
        seen.append(dtype)
        return torch.linalg.eigvalsh(squares.to(dtype), UPLO="U").clamp_min(0).sqrt().flip(-1)

    monkeypatch.setattr(cores, "root_eigenvalues", solver)
    found = cores._solve_noisy(matrices.triu())
    assert seen == [torch.float32]
    alone = solver(matrices, torch.float32).double()
    error, before = ((values.sum(-1) / wanted.sum(-1) - 1).abs().max().item() for values in (found, alone))
    assert error < 1e-5 < before
