"""VBLE: closed forms with a linear decoder, its families, rows, and a pipeline's autoencoder."""

import math

import pytest
import torch

import sampler
from sampler.samplers.measurement import Measurement, measurement
from sampler.samplers.variational import VBLE, Posterior
from tests import tiny

D, M, NOISE, PRIOR = 8, 6, 0.4, 1.3


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


DECODER, OPERATOR = draw(10, D) / 3, draw(M, 10, seed=1) / 3
MAP = OPERATOR @ DECODER
Y = draw(2, M, seed=2)


def measured(y=Y, gain=1.0):
    zero = torch.zeros(len(y), D, dtype=torch.float64)
    return Measurement(lambda z: gain * z @ MAP.T, gain * y, zero, gain=gain, name="vble")


def fitted(family, rows=2, y=Y, gain=1.0, **options):
    options = {"iterations": 1500, "lr": 0.02, "prior_std": PRIOR, **options}
    given = VBLE(NOISE, family, **options)
    return given.fit(measured(y, gain), torch.zeros(rows, D).double(), [5 + k for k in range(rows)])


@pytest.fixture(scope="module")
def gaussian():
    return fitted("gaussian")


def precision(lam=1.0):
    return MAP.T @ MAP / NOISE**2 + lam * torch.eye(D).double() / PRIOR**2


def exact(lam=1.0):
    return (Y @ MAP / NOISE**2) @ torch.linalg.inv(precision(lam))


def test_the_mean_is_that_of_the_posterior_and_a_its_precision(gaussian):
    assert (gaussian.mean - exact()).abs().max() <= 0.06
    ratio = gaussian.scale * precision().diagonal().sqrt()
    assert abs(float(ratio.mean()) - 1) <= 0.03 and (ratio - 1).abs().max() <= 0.08
    assert torch.equal(gaussian.std, gaussian.scale)


def test_it_understates_the_marginal_deviations(gaussian):
    """A factorised q has the conditional deviations, which are smaller: the docs say so."""
    true = torch.linalg.inv(precision()).diagonal().sqrt()
    ratio = gaussian.std / true
    assert (ratio < 1).all() and 0.3 < ratio.min() < 0.95


def test_a_point_is_the_mode():
    """Without draws there is no noise: the mode to rounding, also with lam."""
    found = fitted("point", lam=2.0)
    assert torch.allclose(found.mean, exact(2.0), atol=1e-3)
    assert not found.std.any()
    assert torch.equal(found.draw([1, 2], 0), found.mean)


def test_a_uniform_has_the_width_of_its_own_optimum():
    """a²/12·diag(precision)/2 − log a is least at a = √(12/diag(precision))."""
    found = fitted("uniform")
    assert (found.mean - exact()).abs().max() <= 0.06
    ratio = found.scale * (precision().diagonal() / 12).sqrt()
    assert abs(float(ratio.mean()) - 1) <= 0.03 and (ratio - 1).abs().max() <= 0.08
    drawn = torch.cat([found.draw([1, 2], k) for k in range(2000)]).reshape(2000, 2, D)
    assert ((drawn - found.mean).abs() <= found.scale / 2).all()
    assert torch.allclose(drawn.std(0), found.std, rtol=0.06)


@pytest.mark.parametrize("family", ["gaussian", "uniform"])
def test_the_divergence_is_that_of_the_distributions(family):
    mean, scale = draw(1, D), draw(1, D, seed=3).exp()
    found = VBLE(NOISE, family, prior_std=PRIOR)._divergence(mean, scale.log())
    p = torch.distributions.Normal(torch.zeros(1, D).double(), PRIOR)
    if family == "gaussian":
        right = torch.distributions.kl_divergence(torch.distributions.Normal(mean, scale), p)
    else:
        z = mean + scale * (torch.linspace(0.5, 1999.5, 2000).double()[:, None] / 2000 - 0.5)
        right = (-scale.log() - p.log_prob(z)).mean(0, keepdim=True)
    assert torch.allclose(found, right.sum(1), rtol=1e-6)


def test_rows_do_not_see_their_batch_and_seeds_decide():
    together = fitted("uniform", iterations=20)
    for row in range(2):
        given = VBLE(NOISE, "uniform", iterations=20, lr=0.02, prior_std=PRIOR)
        one = given.fit(measured(Y[row : row + 1]), torch.zeros(1, D).double(), [5 + row])
        assert torch.allclose(one.mean[0], together.mean[row], atol=1e-12)
        assert not torch.equal(one.mean, given.fit(measured(Y[row : row + 1]), one.mean, [9]).mean)


def test_the_unit_of_the_noise_is_that_of_the_data_range():
    """Noise is in units of [-1, 1], y in those of the operator: the gain cancels."""
    a, b = fitted("point", iterations=30), fitted("point", iterations=30, gain=0.5)
    assert torch.allclose(a.mean, b.mean, atol=1e-9)


def test_a_stays_in_its_bounds():
    wide = Measurement(lambda z: 0 * z, 0 * draw(1, D), 0 * draw(1, D))
    given = VBLE(NOISE, "gaussian", prior_std=1e4, lam=1e4, lr=1.0, iterations=50)
    assert given.fit(wide, draw(1, D), [0]).scale.max() == pytest.approx(20)
    tight = VBLE(1e-7, "gaussian", lr=5.0, iterations=30)
    assert tight.fit(measured(), draw(2, D), [0, 1]).scale.min() >= 1.49e-5


def test_latents_of_a_pipeline():
    engine = sampler.load(tiny.sd())
    y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spec = {"name": "superres", "factor": 4}
    given = measurement(spec, y, name="vble", needs_start=True)
    vble = VBLE(0.1, iterations=15, samples=5, batch=2)
    made = vble.restore(engine.pipeline, given, (32, 32), [3], keep=2)
    assert made.images.shape == (1, 2, 3, 32, 32) and made.mean.shape == (1, 3, 32, 32)
    assert made.posterior.losses[-1] < made.posterior.losses[0]
    draws = torch.cat([made.posterior.draw([3], 15 + k) for k in range(5)])
    with torch.no_grad():
        images = engine.pipeline.decode(draws)
    assert torch.allclose(made.images[0], images[:2], atol=1e-5)
    assert torch.allclose(made.mean[0], images.mean(0), atol=1e-5)
    assert torch.allclose(made.std[0], images.std(0), atol=1e-4)
    with pytest.raises(ValueError, match="vble: the image is 32 x 32, the run 64 x 64"):
        vble.restore(engine.pipeline, given, (64, 64), [3])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"noise": 0.0}, "noise = 0.0"),
        ({"family": "dirac"}, "family = 'dirac'"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lam": -1.0}, "lam = -1.0"),
        ({"iterations": 0}, "iterations = 0"),
    ],
)
def test_bad_settings_are_refused(options, part):
    with pytest.raises(ValueError, match=f"^vble: {part}"):
        VBLE(**{"noise": 0.1, **options})


def test_the_standard_deviation_of_each_family():
    one = torch.ones(1, 1)
    for family, std in (("uniform", 1 / math.sqrt(12)), ("gaussian", 1.0), ("point", 0.0)):
        assert float(Posterior(one, one, family).std) == pytest.approx(std)


def test_it_restores_by_name():
    """`engine.restore(method="vble")`: no evaluation, one distribution, n of its draws."""
    engine = sampler.load(tiny.sd())
    y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    run = {"operator": {"name": "superres", "factor": 4}, "method": "vble", "noise": 0.1}
    run |= {"n": 2, "seeds": 3, "steps": 15, "output": "tensor"}
    found = engine.restore(y, **run)
    assert found.nfe == [0, 0] and found.seeds == [3] and found.images.shape == (2, 3, 32, 32)
    assert found.config["method"] == "vble" and found.config["iterations"] == 15
    given = measurement(run["operator"], y, name="vble", needs_start=True)
    direct = VBLE(0.1, iterations=15).restore(engine.pipeline, given, (32, 32), [3], keep=2)
    assert torch.equal(found.mean, direct.mean[0]) and torch.equal(found.std, direct.std[0])
    assert torch.equal(found.images, direct.images[0])
    for change, part in (
        ({"prompt": "a dog"}, "vble evaluates no network"),
        ({"strength": 0.4}, "vble evaluates no network"),
        ({"noise": None}, "needs noise"),
        ({"noise": -1.0}, "vble: noise = -1.0"),
        ({"seeds": [1, 2]}, "give one seed"),
        ({"n": 0}, "n = 0"),
    ):
        with pytest.raises(ValueError, match=part):
            engine.restore(y, **{**run, **change})
