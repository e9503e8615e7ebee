"""DAPS on Gaussians with an exact denoiser: mean, covariance and intervals of the posterior."""

import math
from functools import cache

import pytest
import torch

import sampler
from sampler.core.noise import STREAMS
from sampler.types import Level
from tests.analytic import vp_grid

PROBLEMS, DRAWS, D, M, STEPS = 6, 1500, 8, 3, 100
# neighbours.md 1.2: (mean error in posterior standard deviations, relative error of the covariance)
STATED = {0.1: (0.077, 0.047), 0.5: (0.055, 0.038)}


@cache
def problems(noise):
    """(covariances, operators, measurements, posterior means and covariances), eigenvalues 4..0.05.

    A row of a run is a problem; its elements are DRAWS independent samples.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(PROBLEMS, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    basis = torch.linalg.qr(draw(D, D)).Q
    values = torch.logspace(math.log10(4), math.log10(0.05), D, dtype=torch.float64)
    covariance = basis @ torch.diag(values) @ basis.mT
    operator = draw(M, D) / math.sqrt(D)
    truth = torch.linalg.cholesky(covariance) @ draw(D, 1)
    y = operator @ truth + noise * draw(M, 1)
    seen = operator @ covariance @ operator.mT + noise**2 * torch.eye(M).double()
    gain = covariance @ operator.mT @ torch.linalg.inv(seen)
    return covariance, operator, y.mT, (gain @ y)[..., 0], covariance - gain @ operator @ covariance


def engine(covariance):
    def mean(x, level, _):
        a, s = level.alpha, level.sigma
        inner = a * a * covariance + s * s * torch.eye(D).double()
        return x @ (a * covariance @ torch.linalg.inv(inner)).mT

    return sampler.Engine(sampler.denoiser(mean, "x0"))


def spec(name, noise):
    _, operator, y, _, _ = problems(noise)
    return {
        "name": name,
        "operator": lambda x: x @ operator[: len(x)].mT,
        "y": y.expand(-1, DRAWS, -1),
        "noise": noise,
    }


@cache
def drawn(noise, name="daps"):
    levels = vp_grid(STEPS)
    x = torch.randn(PROBLEMS, DRAWS, D, generator=torch.Generator().manual_seed(1)).double()
    run = engine(problems(noise)[0])
    if name == "daps":
        return run.run(x, levels, sampler=spec(name, noise))
    return run.run(x, levels, sampler="ddim", guidance=spec(name, noise))


def errors(samples, noise):
    *_, mean, covariance = problems(noise)
    std = covariance.diagonal(dim1=1, dim2=2).sqrt()
    off = ((samples.mean(1) - mean) / std).abs().mean()
    found = torch.stack([torch.cov(rows.T) for rows in samples])
    spread = (
        (found - covariance).flatten(1).norm(dim=1) / covariance.flatten(1).norm(dim=1)
    ).mean()
    return float(off), float(spread)


@pytest.mark.parametrize("noise", STATED)
def test_mean_and_covariance_are_those_of_the_posterior(noise):
    mean, covariance = errors(drawn(noise), noise)
    assert mean == pytest.approx(STATED[noise][0], abs=0.03) and mean <= 0.1
    assert covariance == pytest.approx(STATED[noise][1], abs=0.03) and covariance <= 0.08


def test_nine_tenths_intervals_hold_nine_tenths_of_the_posterior():
    *_, mean, covariance = problems(0.5)
    std = covariance.diagonal(dim1=1, dim2=2).sqrt()
    low, high = drawn(0.5).quantile(torch.tensor([0.05, 0.95]).double(), dim=1)
    normal = torch.distributions.Normal(mean, std)
    held = normal.cdf(high) - normal.cdf(low)
    assert 0.88 <= float(held.mean()) <= 0.92


def test_the_rule_fits_but_its_spread_is_not_that_of_the_posterior():
    """`data` on deterministic DDIM: what `daps` is for."""
    mean, covariance = errors(drawn(0.5, "data"), 0.5)
    exact = errors(drawn(0.5), 0.5)
    assert exact[0] < mean < 0.35 and 4 * exact[1] < covariance


def test_the_draws_of_a_step_are_named_and_their_own():
    assert {"y", "x"} <= set(STREAMS)
    spans = []

    class Watched(type(sampler.build("sampler", "ddim"))):
        draws = ("y",)

        def step(self, x, pred, span, state):
            spans.append(span.noise("y", x))
            with pytest.raises(KeyError, match="not among the sampler's draws"):
                span.noise("x", x)
            return super().step(x, pred, span, state)

    x = torch.zeros(2, 3)
    run = sampler.Engine(sampler.denoiser(lambda x, level, _: x))
    run.run(x, vp_grid(2), sampler=Watched(), seeds=[4, 5])
    alone = spans[1][1].clone()
    spans.clear()
    run.run(x[:1], vp_grid(2), sampler=Watched(), seeds=[5])
    assert torch.equal(spans[1][0], alone) and not torch.equal(spans[0][0], alone)


def test_samples_with_measurements_and_levels_of_their_own():
    """Each is what it would be alone with its own y: one walks, one skips and ends early."""
    levels, y = vp_grid(4), torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.1]]).double()
    paths = ((0, 1, 2, 3, 4), (0, 2, 4, 4, 4), (0, 1, 3, 4, 4))
    run = sampler.Engine(sampler.denoiser(lambda x, level, _: torch.tanh(x), "x0"))
    given = {"name": "daps", "operator": lambda x: x[:, :2] ** 2, "noise": 0.3}
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).double()
    together = [
        Level(*(torch.tensor(v, dtype=torch.float64) for v in zip(*at, strict=True)))
        for at in zip(*([levels[i] for i in path] for path in paths), strict=True)
    ]
    found = run.run(x, together, sampler={**given, "y": y}, seeds=[7, 8, 9])
    for row, path in enumerate(paths):
        own = [levels[i] for i in dict.fromkeys(path)]
        spec = {**given, "y": y[row : row + 1]}
        alone = run.run(x[row : row + 1], own, sampler=spec, seeds=[7 + row])
        assert (found[row] - alone[0]).abs().max() <= 1e-12, row


def test_a_decoded_image_needs_a_pipeline():
    given = {**spec("daps", 0.5), "space": "image"}
    with pytest.raises(ValueError, match=r"daps: space = 'image' needs generate\(\)"):
        engine(problems(0.5)[0]).run(torch.zeros(1, 1, D), vp_grid(2), sampler=given)
    rule = {**given, "name": "data"}
    with pytest.raises(ValueError, match=r"data: space = 'image' needs generate\(\)"):
        engine(problems(0.5)[0]).run(torch.zeros(1, 1, D), vp_grid(2), guidance=rule)


def test_a_y_of_another_operator_is_refused_in_one_sentence():
    given = {"name": "daps", "operator": {"name": "superres", "factor": 2}, "noise": 0.1}
    run = sampler.Engine(sampler.denoiser(lambda x, level, _: x))
    with pytest.raises(ValueError, match=r"daps: the operator maps x \(3, 8, 8\) to \(3, 4, 4\)"):
        run.run(
            torch.zeros(1, 3, 8, 8), vp_grid(2), sampler={**given, "y": torch.zeros(1, 3, 8, 8)}
        )
    with pytest.raises(ValueError, match="daps: y has 3 rows for a batch of 2"):
        run.run(
            torch.zeros(2, 3, 8, 8), vp_grid(2), sampler={**given, "y": torch.zeros(3, 3, 4, 4)}
        )
    with pytest.raises(ValueError, match=r"daps: noise = 0 must be a number above 0"):
        sampler.build("sampler", {**given, "y": torch.zeros(1, 3, 4, 4), "noise": 0})
