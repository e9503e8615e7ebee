"""Copies, realism and loss: closed forms, and controls that mean what they say."""

import math

import pytest
import torch

import sampler
from sampler.bundled import classifier
from sampler.core.noise import Noise
from sampler.engine.inspection import realism
from sampler.engine.inspection.loss import eigenvalues, loss, wiener
from sampler.engine.inspection.memory import agreement, nearest
from tests.analytic import vp_grid


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


@pytest.fixture(scope="module")
def images(engine):
    made = engine.generate(["a fox", "a dog"], n=12, seeds=0, steps=1, output="tensor")
    return made.images


def test_a_denoiser_that_knows_its_training_points_copies_them():
    """The posterior mean under 64 points is their softmax average; its samples are the points."""
    g = torch.Generator().manual_seed(0)
    points = torch.randn(64, 16, generator=g, dtype=torch.float64)

    def empirical(x, level, cond):
        scaled = (x[:, None] - level.alpha * points).square().sum(2) / (2 * level.sigma**2)
        return (-scaled).softmax(1) @ points

    engine = sampler.Engine(sampler.denoiser(empirical, "x0"))
    noise = torch.randn(8, 16, generator=g, dtype=torch.float64)
    samples = engine.run(noise, vp_grid(40))
    found = nearest(samples, points)
    assert found.first.max() < 1e-9 and found.second.min() > 0.05
    assert torch.allclose(samples, points[found.index], atol=1e-6)
    fresh = nearest(torch.randn(8, 16, generator=g, dtype=torch.float64), points)
    assert fresh.first.min() > 0.05  # new samples are no copies


def test_distances_are_one_minus_the_cosine():
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    found = nearest(a, b)
    assert found.index.tolist() == [1] and found.first.tolist() == [0.0]
    assert found.second.item() == pytest.approx(1 - 0.5**0.5)
    with pytest.raises(ValueError, match="at least two training images"):
        nearest(a, b[:1])


def test_two_equal_models_agree(engine):
    run = {"steps": 2, "guidance": "none"}
    assert agreement(engine, engine, ["a fox", "a dog"], **run).min() > 0.999
    flow = sampler.load("bundled-flow")
    other = agreement(engine, flow, ["a fox"], **run)
    assert -1 <= other.item() < 0.999


def test_equal_sets_are_not_told_apart_and_others_are():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 5, generator=g), torch.randn(200, 5, generator=g)
    _, same = realism.told_apart(a, b)
    assert same.low < 0.5 < same.high and same.count == 200
    _, moved = realism.told_apart(a, b + torch.tensor([3.0, 0, 0, 0, 0]))
    assert moved.value > 0.9


def test_realism_has_its_two_controls(engine, images):
    shares, probe = realism.realism(engine, images, images.flip(3), realism.log_spectrum)
    assert list(shares) == ["generated", "real", "real through the VAE"]
    assert {share.count for share in shares.values()} == {12}
    table = realism.table_of(shares, "spectrum")
    assert [row["real against"] for row in table] == list(shares)
    with pytest.raises(ValueError, match="at least 16 real"):
        realism.realism(engine, images[:10], images, realism.log_spectrum)


def test_the_spectrum_of_white_noise_is_flat_and_blur_lowers_its_end():
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = realism.log_spectrum(noise).mean(0).view(3, -1)
    assert found.shape == (3, 24) and (found[:, 2:] - found[:, 2:].mean()).abs().max() < 0.3
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    gap = (realism.log_spectrum(blurred).mean(0).view(3, -1) - found).mean(0)
    assert gap[-1] < gap[2] - 1


def test_evidence_averages_to_the_probes_score(engine, images):
    model = classifier.load()
    x = model.features(images)
    probe, _ = realism.told_apart(x[:12], x[12:])
    maps = realism.evidence(engine, images, probe, "classifier")
    assert maps is not None
    scores = probe.scores(x)
    right = scores[:, 1] - scores[:, 0]
    gap = maps.mean((1, 2)).double() - right
    assert gap.std() < 1e-3 * right.std()  # equal up to the probe's offset
    assert realism.evidence(engine, images, probe, "spectrum") is None


def test_the_best_linear_denoiser_has_its_closed_form():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.1])
    values, q = eigenvalues(z), 0.8
    variances = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    assert torch.allclose(values, variances)
    y = z + q * torch.randn(4000, 3, generator=g, dtype=torch.float64)
    gain = torch.cov(z.T) @ torch.linalg.inv(torch.cov(z.T) + q * q * torch.eye(3).double())
    error = ((y - z.mean(0)) @ gain.T + z.mean(0) - z).square().mean()
    assert wiener(values, q, 3) == pytest.approx(float(error), rel=0.05)


def test_loss_is_the_mean_squared_error_of_x0(engine, images):
    texts = ["a fox"] * 2 + ["a dog"] * 2
    some = images[[0, 1, 12, 13]]
    (row,) = loss(engine, some, texts, (0.3,), seed=3)
    adapter = engine.pipeline
    z, level = adapter.latents_of(some).detach(), adapter.schedule.level(299)
    noise = Noise((3, 4, 5, 6)).draw(0, z, "start")
    x = level.alpha * z + level.sigma * noise
    both = adapter.encode(texts, [""] * 4, True, (64, 64))
    with torch.no_grad():
        c, u = (
            adapter.predict(x, adapter.forward(x, level, b, "main"), level, "main").x0.tensor()
            for b in (both.cond, both.uncond)
        )
    assert row["error"] == pytest.approx(float((c - z).square().mean()), rel=1e-4)
    assert row["gap"] == pytest.approx(float((c - u).square().mean()), rel=1e-3)
    assert row["timestep"] == 299 and row["wiener"] > 0
    (plain,) = loss(engine, some, None, (0.3,))
    assert math.isnan(plain["gap"])
    with pytest.raises(ValueError, match="1 prompts for 4 images"):
        loss(engine, some, ["a"])
    with pytest.raises(ValueError, match="no signal"):
        loss(engine, some, None, (1.0,))
