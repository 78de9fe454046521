"""The kernels against LAPACK, and the GPU's routes against the CPU's."""

from __future__ import annotations

import pytest
import torch

from selector import spectra
from selector.spectra.linalg import root_eigenvalues

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def semidefinite(batch: int, size: int, kind: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    if kind == "decaying":
        x = torch.linalg.qr(x).Q / torch.arange(1, size + 1, dtype=torch.float64)
    elif kind == "rank deficient":
        x = x[..., :5]
    elif kind == "padded":
        x[:, size // 3 :] = 0
    elif (
        kind == "graded"
    ):  # as of samples with few loss tokens: what is left after some columns underflows when squared
        x *= torch.logspace(0, -13, size, dtype=torch.float64)[:, None]
    return x @ x.mT


# In registers up to 128, by way of a band from 256 in float32 and large batches, else one program each or as many as share a matrix.
SIZES = [(600, 1), (600, 37), (600, 64), (600, 101), (3, 128), (600, 192), (600, 320), (2, 448), (40, 320), (520, 256), (130, 512), (1, 1024), (32, 1088)]  # fmt: skip


@pytest.mark.parametrize(("batch", "size"), SIZES)
@pytest.mark.parametrize("kind", ["random", "decaying", "rank deficient", "padded", "graded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_agree_with_lapack(batch, size, kind, dtype):
    matrices = semidefinite(min(batch, 4), size, kind).repeat(-(-batch // 4), 1, 1)[:batch]
    oracle = torch.linalg.eigvalsh(matrices[:4]).clamp_min(0).flip(-1)
    roots = root_eigenvalues(matrices.to("cuda", dtype)).cpu().double()
    largest = oracle[:, :1]
    assert (
        (roots[:4].square() - oracle).abs()
        <= 40 * torch.finfo(dtype).eps * largest + 4e-9 * largest * (dtype == torch.float64)
    ).all()
    assert torch.equal(roots, roots[torch.arange(batch) % 4])  # all others are the first ones again, digit by digit


@pytest.mark.parametrize(("batch", "size"), [(3, 37), (3, 192), (600, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_upper_triangle_is_read(batch, size, dtype):
    matrices = semidefinite(3, size, "random").repeat(batch // 3, 1, 1).cuda()
    spoiled = matrices.triu() + torch.full_like(matrices, torch.nan).tril(-1)
    torch.testing.assert_close(root_eigenvalues(spoiled, dtype), root_eigenvalues(matrices, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fast", "high", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 37, 96, 80), (2, 200, 64, 48), (0, 5, 8, 8), (2, 0, 8, 8)])
def test_gpu_and_cpu_agree(precision, dtype, shape):
    n, t, i, o = shape
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(n, t, i, generator=generator).to(dtype), torch.randn(n, t, o, generator=generator).to(dtype)
    cpu, gpu = (
        spectra.singular_values(x, delta, precision),
        spectra.singular_values(x.cuda(), delta.cuda(), precision).cpu(),
    )
    torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-2 if precision == "fast" else 1e-4)


@pytest.mark.parametrize("t", [20, 100])
def test_a_non_finite_sample_poisons_no_other(t):
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(3, t, 48, generator=generator).cuda(), torch.randn(3, t, 40, generator=generator).cuda()
    clean = spectra.singular_values(x, delta, "fast")
    x[1, 3, 5] = torch.nan
    sigma = spectra.singular_values(x, delta, "fast")
    assert sigma[1].isnan().all()
    torch.testing.assert_close(sigma[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=1e-6)
