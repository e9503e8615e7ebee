"""The Jacobian of denoisers whose Jacobian is known in closed form."""

import pytest
import torch

from sampler.engine.inspection.basis import basis

SIZE, Q = 24, 0.7


@pytest.fixture(scope="module")
def gaussian():
    """(covariance, mean, D): the posterior mean of N(mean, C) seen at noise Q."""
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(1, -2, SIZE, dtype=torch.float64)
    cov = turn @ torch.diag(values) @ turn.T
    mean = torch.randn(SIZE, generator=g, dtype=torch.float64)
    gain = cov @ torch.linalg.inv(cov + Q * Q * torch.eye(SIZE).double())

    def denoise(y):
        return (mean + (y.flatten(1) - mean) @ gain.T).view(y.shape)

    return cov, mean, gain, denoise


@pytest.fixture(scope="module")
def y(gaussian):
    cov, mean, _, _ = gaussian
    g = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(cov)
    x0 = mean + root @ torch.randn(SIZE, generator=g, dtype=torch.float64)
    return (x0 + Q * torch.randn(SIZE, generator=g, dtype=torch.float64)).view(1, 2, 3, 4)


def test_the_whole_jacobian_is_the_closed_form(gaussian, y):
    cov, mean, gain, denoise = gaussian
    found = basis(denoise, y, Q, full=True, count=SIZE)
    d = denoise(y)
    values, vectors = torch.linalg.eigh(gain)
    assert found.trace == pytest.approx(float(gain.trace()), abs=1e-6) and found.trace_error == 0
    assert found.predicted == pytest.approx(Q * Q * float(gain.trace()), abs=1e-6)
    sure = float((d - y).square().sum()) - SIZE * Q * Q + 2 * Q * Q * float(gain.trace())
    assert found.sure == pytest.approx(sure, abs=1e-6)
    assert found.asymmetry < 1e-6 and torch.equal(found.denoised, d)
    assert torch.allclose(found.values, values.flip(0), atol=1e-6)
    overlap = (found.vectors.flatten(1) * vectors.flip(1).T).sum(1).abs()
    assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-6)
    offset = mean - gain @ mean
    assert found.affine == pytest.approx(float(offset.norm() / d.norm()), abs=1e-6)


def test_the_jacobian_is_the_posterior_covariance(gaussian, y):
    """J = Cov[x0 | y]/q², the fact behind the predicted error."""
    cov, _, gain, _ = gaussian
    posterior = cov - gain @ cov
    assert torch.allclose(gain, posterior / Q**2, atol=1e-9)


def test_the_estimates_are_near_the_closed_form(gaussian, y):
    _, _, gain, denoise = gaussian
    found = basis(denoise, y, Q, signs=200, count=8, rounds=8)
    assert abs(found.trace - float(gain.trace())) < 4 * found.trace_error
    assert found.asymmetry < 1e-6  # exact: the same signs on both sides
    right = torch.linalg.eigvalsh(gain).flip(0)[:3]
    assert torch.allclose(found.values[:3], right, atol=5e-3)
    again = basis(denoise, y, Q, signs=200, count=8, rounds=8)
    assert again.trace == found.trace


def test_asymmetry_of_a_map_without_symmetry():
    g = torch.Generator().manual_seed(3)
    j = torch.randn(6, 6, generator=g, dtype=torch.float64)
    y = torch.randn(1, 6, generator=g, dtype=torch.float64)
    found = basis(lambda y: y @ j.T, y, 1.0, full=True)
    assert found.asymmetry == pytest.approx(float((j - j.T).norm() / j.norm()), abs=1e-8)
    assert found.affine < 1e-8  # no offset
    estimate = basis(lambda y: y @ j.T, y, 1.0, signs=4000, count=3)
    assert estimate.asymmetry == pytest.approx(found.asymmetry, rel=0.1)


def test_sure_estimates_the_error_without_the_clean_image(gaussian):
    cov, mean, gain, denoise = gaussian
    g = torch.Generator().manual_seed(5)
    root = torch.linalg.cholesky(cov)
    gaps = []
    for _ in range(300):
        x0 = mean + root @ torch.randn(SIZE, generator=g, dtype=torch.float64)
        y = (x0 + Q * torch.randn(SIZE, generator=g, dtype=torch.float64))[None]
        d = denoise(y)
        sure = (d - y).square().sum() - SIZE * Q * Q + 2 * Q * Q * gain.trace()
        gaps.append(float(sure - (d - x0).square().sum()))
    gaps = torch.tensor(gaps)
    assert gaps.mean().abs() < 3 * gaps.std() / 300**0.5


def test_refusals(gaussian):
    denoise = gaussian[3]
    with pytest.raises(ValueError, match="2 images of 24 elements; give one"):
        basis(denoise, torch.zeros(2, SIZE), Q)
    with pytest.raises(ValueError, match="at most 2048 elements"):
        basis(lambda y: y, torch.zeros(1, 2049), Q, full=True)
