"""The kernels of the losses against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from selector.gradients.losses import _TokenLogProbs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [37, 4096, 50_257])
def test_log_probabilities_and_their_gradient_agree_with_autograd(dtype, width):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, width, generator=generator)).to(dtype)
    rows = torch.randperm(50, generator=generator)[:30]
    tokens = torch.randint(width, (30,), generator=generator)
    logits[rows[:10], tokens[:10]] = torch.linspace(15, 60, 10).to(dtype)  # nearly sure of them
    logits[rows[10:], :5] = -torch.inf  # what a model rules out
    tokens[10:].clamp_(min=5)
    weights = torch.randn(30, generator=generator)
    exact = logits.double().detach().clone().requires_grad_()
    wanted = exact[rows].log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    wanted.backward(weights.double())
    given = logits.cuda().detach().requires_grad_()
    found = _TokenLogProbs.apply(given, rows.cuda(), tokens.cuda())
    found.backward(weights.cuda())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    assert given.grad is not None
    torch.testing.assert_close(given.grad.cpu().double(), exact.grad, rtol=TOLERANCE[dtype], atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_log_probability(bad):
    logits = torch.zeros(3, 5000, device="cuda")
    logits[1, 4321] = bad
    tokens = torch.tensor([1, 2, 3], device="cuda")
    found = _TokenLogProbs.apply(logits, torch.arange(3, device="cuda"), tokens)
    assert found.isnan().tolist() == [False, True, False]
