"""Inner products from factors against formed gradients, and sketches against both."""

from __future__ import annotations

import pytest
import torch

from selector import spectra
from selector.errors import ConfigError, SelectorError


def factors(n: int, t: int, i: int = 12, o: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, t, i, generator=generator), torch.randn(n, t, o, generator=generator)


def gradients(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (delta.double().mT @ x.double()).flatten(1)


def test_inner_products_are_those_of_the_formed_gradients():
    a, b = factors(4, 7), factors(4, 5, seed=1)
    torch.testing.assert_close(spectra.inner_products(*a, *b), (gradients(*a) * gradients(*b)).sum(-1))
    torch.testing.assert_close(spectra.pairwise_inner_products(*a, *b), gradients(*a) @ gradients(*b).T)
    torch.testing.assert_close(spectra.pairwise_inner_products(*a), gradients(*a) @ gradients(*a).T)
    assert spectra.pairwise_inner_products(*factors(0, 5)).shape == (0, 0)


def test_cosines_are_those_of_the_formed_gradients():
    a, b = factors(4, 7), factors(4, 5, seed=1)
    b[1][2] = 0
    wanted = torch.nn.functional.cosine_similarity(gradients(*a), gradients(*b))
    got = spectra.cosines(*a, *b)
    assert got[2].isnan()
    torch.testing.assert_close(got[[0, 1, 3]], wanted[[0, 1, 3]])


def test_gradients_of_different_shapes_are_refused():
    with pytest.raises(SelectorError, match="10x12 and 10x11"):
        spectra.cosines(*factors(1, 5), *factors(1, 5, i=11))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_sketches_preserve_inner_products_without_bias(distribution):
    x, delta = factors(3, 6)
    exact = spectra.pairwise_inner_products(x, delta)
    products = []
    for seed in range(1500):
        sketch = spectra.sketch(
            x, delta, "0.q", spectra.SketchConfig(dimension=16, distribution=distribution, seed=seed)
        ).double()
        products.append(sketch @ sketch.T)
    products = torch.stack(products)
    standard_error = products.std(0) / len(products) ** 0.5
    assert ((products.mean(0) - exact).abs() < 4.5 * standard_error).all()


def test_sketch_error_falls_with_the_dimension():
    x, delta = factors(2, 6, i=64, o=64)
    exact = spectra.pairwise_inner_products(x, delta)

    def error(dimension: int) -> float:
        sketches = [
            spectra.sketch(x, delta, "0.q", spectra.SketchConfig(dimension=dimension, seed=s)).double()
            for s in range(40)
        ]
        return torch.stack([s @ s.T - exact for s in sketches]).square().mean().sqrt().item()

    assert error(1024) < 0.5 * error(64)


def test_sketch_is_that_of_the_formed_gradient_and_ignores_padding():
    config = spectra.SketchConfig(dimension=16)
    x, delta = factors(2, 6)
    sketch = spectra.sketch(x, delta, "0.q", config)
    padded = spectra.sketch(
        torch.nn.functional.pad(x, (0, 0, 0, 3), value=torch.nan),
        torch.nn.functional.pad(delta, (0, 0, 0, 3)),
        "0.q",
        config,
    )
    torch.testing.assert_close(padded, sketch)
    gradient = delta.mT @ x  # as one token with the gradient's rows as deltas: G = Σ_o e_o G_o
    torch.testing.assert_close(
        spectra.sketch(gradient, torch.eye(10).expand(2, -1, -1), "0.q", config), sketch, rtol=1e-4, atol=1e-4
    )


def test_sketches_depend_on_seed_and_layer_alone():
    x, delta = factors(2, 6)
    first = spectra.sketch(x, delta, "0.q", spectra.SketchConfig(dimension=16))
    torch.manual_seed(123)
    assert torch.equal(first, spectra.sketch(x, delta, "0.q", spectra.SketchConfig(dimension=16)))
    assert not torch.equal(first, spectra.sketch(x, delta, "1.q", spectra.SketchConfig(dimension=16)))
    assert not torch.equal(first, spectra.sketch(x, delta, "0.q", spectra.SketchConfig(dimension=16, seed=1)))


def test_layers_are_normalised_before_they_are_joined():
    sketches = [torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.3, 0.4], [1.0, 0.0]])]
    joined = {
        n: spectra.join(sketches, spectra.SketchConfig(normalization=n)).tolist() for n in ("unit", "clip", "none")
    }
    assert joined["unit"] == [pytest.approx([0.6, 0.8, 0.6, 0.8]), pytest.approx([0, 0, 1, 0])]
    assert joined["clip"] == [pytest.approx([0.6, 0.8, 0.3, 0.4]), pytest.approx([0, 0, 1, 0])]
    assert joined["none"] == [pytest.approx([3, 4, 0.3, 0.4]), pytest.approx([0, 0, 1, 0])]


@pytest.mark.parametrize("setting", [{"dimension": 10}, {"dimension": 0}, {"clip_at": 0.0}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError):
        spectra.SketchConfig(**setting)
