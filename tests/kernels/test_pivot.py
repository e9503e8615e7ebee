"""Variances from one reduction: first elements of rows as pivots, on every backend."""

import pytest
import torch
from sampler_kernels import Lin, gram, pivot, settle, use_backend
from sampler_kernels.counting import count_launches

from sampler.guidance.cfg import rescaled
from tests.kernels.canary import watched


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(g, c, phi):
    """The formula as the paper has it."""
    ratio = c.flatten(1).std(1) / g.flatten(1).std(1)
    return g * (phi * ratio + (1 - phi)).view(-1, *(1,) * (g.ndim - 1))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 7, 1000, 4097])
def test_a_pivot_is_the_first_element_of_the_same_formula(monkeypatch, backend, dtype, n):
    x, y = draw(3, n, dtype=dtype), draw(3, n, seed=1, dtype=dtype)
    lin = (Lin.of(x) * torch.tensor([0.3, -1.7, 2.0]) - y) / 0.7 + Lin.ones(x) * 0.5
    canary = watched(monkeypatch)
    with use_backend(backend):
        first, value, products = settle([pivot(lin), lin, gram(lin - pivot(lin), Lin.ones(x))])
    assert torch.equal(first, value[:, :1].expand(3, n))
    assert torch.allclose(products[0, 1], (value - first).sum(1), rtol=1e-5, atol=1e-4)
    if backend == "triton":
        canary.check()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_rescaling_is_accurate_whatever_the_mean(backend, mean):
    """Σv² − (Σv)²/n loses a digit for every factor of 3 in mean/std; about a pivot it does not."""
    g, c = draw(4, 5000) * 3 + mean, draw(4, 5000, seed=1) - 2 * mean
    g[0, 0] += 12.0  # a pivot four deviations off
    with use_backend(backend):
        mine = settle(rescaled(Lin.of(g), Lin.of(c), 0.7))
    right = plain(g.double(), c.double(), 0.7)
    assert (mine - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_without_variance_stay_as_they_are(backend):
    g, c = draw(3, 40), draw(3, 40, seed=1)
    g[1], c[2] = 5.3, 0.1
    with use_backend(backend):
        mine = settle(rescaled(Lin.of(g), Lin.of(c), 1.0))
        single = settle(rescaled(Lin.of(g[:, :1]), Lin.of(c[:, :1]), 0.7))
    assert torch.equal(mine[1], g[1]) and torch.equal(mine[2], torch.zeros(40))
    assert torch.equal(single, g[:, :1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_variance_about_a_pivot_has_the_gradient_of_the_variance(backend):
    g, c = (draw(3, 4, 25, seed=s).double().requires_grad_() for s in range(2))
    weight = draw(3, 4, 25, seed=2)
    right = torch.autograd.grad((plain(g, c, 0.7) * weight).sum(), (g, c))
    g, c = (t.detach().float().requires_grad_() for t in (g, c))
    with use_backend(backend):
        mine = settle(rescaled(Lin.of(g), Lin.of(c), 0.7))
        found = torch.autograd.grad((mine * weight).sum(), (g, c))
    for a, b in zip(found, right, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_rows_that_begin_anew_at_each_coefficient_are_left_to_the_reference():
    x, fine = draw(2, 4, 5), draw(2, 4, 1, seed=1)
    make = Lin.of(x) * fine - pivot(Lin.of(x) * fine)
    with use_backend("triton"), count_launches() as launches:
        mine = settle(make)
    right = x * fine
    assert not launches and torch.equal(mine, right - right[:, :1, :1])
