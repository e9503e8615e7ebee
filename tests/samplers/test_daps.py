"""DAPS on Gaussians with an exact denoiser: mean, covariance and intervals of the posterior."""

import pytest
import torch

import sampler
from sampler.core.noise import STREAMS
from sampler.types import Level
from scripts.study.restore_gaussian import D, Gaussians, levels, moments, restored
from tests.analytic import vp_grid

# neighbours.md 1.2: (mean error in posterior standard deviations, relative error of the covariance)
STATED = {0.1: (0.077, 0.047), 0.5: (0.055, 0.038)}


def errors(problems, grid):
    """(mean error, covariance error), means over the problems, and their 95 % half-widths."""
    found = problems.errors(*moments(problems, grid))
    half = [1.96 * float(v.std()) / len(v) ** 0.5 for v in found]
    return [float(v.mean()) for v in found], half


@pytest.mark.parametrize("noise", STATED)
def test_six_problems_are_as_stated(noise):
    mean, covariance = errors(Gaussians.draw(6, noise), vp_grid(100))[0]
    assert mean == pytest.approx(STATED[noise][0], abs=0.03) and mean <= 0.1
    assert covariance == pytest.approx(STATED[noise][1], abs=0.03) and covariance <= 0.08


@pytest.mark.parametrize("noise", STATED)
def test_most_problems_are_within_a_tenth_of_a_deviation(noise):
    """Over 500 problems, with 95 % certainty, in 100 equal steps of the logarithm of the noise."""
    problems = Gaussians.draw(500, noise, seed=3)
    (mean, covariance), (mean_half, covariance_half) = errors(problems, levels("exponential"))
    assert mean + mean_half <= 0.1 and covariance + covariance_half <= 0.08


def test_what_is_left_is_a_bias_of_the_steps():
    """No draws, no noise: it falls as the square root of the steps, and with a better grid."""
    problems = Gaussians.draw(500, 0.1, seed=3)
    (few, _), (half, _) = errors(problems, levels())
    assert 0.1 < few - half and few < 0.12  # in equal steps of the time
    assert errors(problems, levels(steps=200))[0][0] < 0.8 * few
    assert errors(problems, levels("exponential"))[0][0] + half < few


def test_runs_have_these_moments():
    """Draws of the loop: 95 % of the elements of mean and covariance in their 95 % intervals."""
    problems, draws = Gaussians.draw(4, 0.5), 2000
    found = restored(problems, "daps", {}, draws, steps=20)
    mean, covariance = moments(problems, levels(steps=20))
    std = covariance.diagonal(dim1=1, dim2=2).sqrt()
    off = (found.mean(1) - mean) / std * draws**0.5
    assert off.abs().max() < 4 and off.square().mean().sqrt() == pytest.approx(1, abs=0.35)
    spread = torch.stack([torch.cov(rows.T) for rows in found])
    scale = (std[:, :, None] ** 2 * std[:, None] ** 2 + covariance**2).sqrt() / draws**0.5
    assert ((spread - covariance) / scale).abs().max() < 4.5


def test_nine_tenths_intervals_hold_nine_tenths_of_the_posterior():
    problems = Gaussians.draw(6, 0.5)
    mean, covariance = moments(problems, levels())
    ends = 1.645 * covariance.diagonal(dim1=1, dim2=2).sqrt()
    normal = torch.distributions.Normal(problems.mean, problems.std)
    held = normal.cdf(mean + ends) - normal.cdf(mean - ends)
    assert 0.88 <= float(held.mean()) <= 0.92


def test_the_rule_fits_but_its_spread_is_not_that_of_the_posterior():
    """`data` on deterministic DDIM: what `daps` is for."""
    problems = Gaussians.draw(6, 0.5)
    found = restored(problems, "data", {"eta": 0.0}, 1000)
    off, spread = problems.errors(found.mean(1), torch.stack([torch.cov(one.T) for one in found]))
    exact = errors(problems, levels())[0]
    assert exact[0] < off.mean() < 0.35 and 4 * exact[1] < spread.mean()


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
    problems = Gaussians.draw(1, 0.5)
    given = {"operator": problems.measure, "y": problems.y[:, None], "noise": 0.5}
    given |= {"space": "image"}
    for name, kind in (("daps", "sampler"), ("data", "guidance")):
        with pytest.raises(ValueError, match=rf"{name}: space = 'image' needs generate\(\)"):
            problems.engine.run(torch.zeros(1, 1, D), vp_grid(2), **{kind: {"name": name, **given}})


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
