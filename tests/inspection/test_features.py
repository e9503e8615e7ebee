"""Features of blocks, and the probe that reads them."""

import pytest
import torch
import torch.nn.functional as F

import sampler
from sampler.engine.inspection.features import level_at
from sampler.engine.inspection.probe import ridge_probe, wilson
from tests import tiny


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_without_noise_the_input_is_the_pooled_latent(engine, images):
    for pool in (1, 2, 4):
        found = engine.features(images, t=0, blocks=("input",), pool=pool)["input"]
        right = F.adaptive_avg_pool2d(engine.pipeline.latents_of(images), pool).flatten(1)
        assert torch.allclose(found, right, atol=1e-6)


def test_with_noise_the_input_is_the_noised_latent(engine, images):
    level = level_at(engine.pipeline.schedule, 0.15)
    z = engine.pipeline.latents_of(images)
    noise = torch.randn(1, *z.shape[1:], generator=torch.Generator().manual_seed(5))
    right = F.adaptive_avg_pool2d(level.alpha * z + level.sigma * noise, 2).flatten(1)
    found = engine.features(images, t=0.15, blocks=("input",), seed=5)["input"]
    assert torch.allclose(found, right, atol=1e-5)


def test_a_feature_depends_on_its_image_alone(engine, images):
    together = engine.features(images, blocks=("mid", "up.0"))
    alone = engine.features(images[1:2], blocks=("mid", "up.0"))
    swapped = engine.features(images.flip(0), blocks=("mid", "up.0"), batch_size=1)
    for name, values in together.items():
        assert values.shape[1] == 128 * 4 and values.isfinite().all()
        assert torch.allclose(values[1:2], alone[name], atol=1e-4)
        assert torch.allclose(values, swapped[name].flip(0), atol=1e-4)


def test_shares_of_the_schedule(engine):
    schedule = engine.pipeline.schedule
    assert level_at(schedule, 0.15).t == 149 and level_at(schedule, 0.45).t == 449
    assert level_at(schedule, 0)[1:] == (1.0, 0.0) and level_at(schedule, 1).t == 999
    flow = sampler.Schedule.flow({})
    assert level_at(flow, 0.25)[1:] == (0.75, 0.25)
    edm = sampler.Schedule.edm({})
    assert level_at(edm, 1).sigma == pytest.approx(80) and level_at(edm, 0.3).sigma < 10


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
def test_blocks_of_transformers_are_the_image_alone(name):
    engine = sampler.load(getattr(tiny, name)())
    images = torch.rand(2, 3, 32, 32)
    found = engine.features(images, blocks=engine.pipeline.blocks[1:], pool=1)
    assert len(found) == 2 and all(len(v) == 2 and v.isfinite().all() for v in found.values())
    assert list(engine.features(images)) == ["blocks.1"]


def test_refusals(engine, images):
    with pytest.raises(ValueError, match=r"t = 2 must lie in 0\.\.1"):
        engine.features(images, t=2)
    with pytest.raises(ValueError, match="no block 'up.9'"):
        engine.features(images, blocks=("up.9",))
    with pytest.raises(ValueError, match="height = 63"):
        engine.features(images[..., :63, :])
    with pytest.raises(sampler.SamplerError, match="video pipeline"):
        from tests.tiny_transformers import wan

        sampler.load(wan()).features(images)


def test_the_probe_solves_ridge_regression():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=g)
    labels = (x[:, 0] + 0.1 * torch.randn(40, generator=g) > 0).long()
    probe = ridge_probe(x, labels)
    z = (x.double() - x.double().mean(0)) / x.double().std(0)
    y = F.one_hot(labels).double()
    normal = z.T @ z + probe.penalty * torch.eye(6).double()
    assert torch.allclose(probe.weights, torch.linalg.solve(normal, z.T @ (y - y.mean(0))))
    fresh = torch.randn(200, 6, generator=g)
    share = probe.accuracy(fresh, (fresh[:, 0] > 0).long())
    assert share.value > 0.9 and share.low < share.value < share.high
    with pytest.raises(ValueError, match="two classes"):
        ridge_probe(x, torch.zeros(40))


def test_leave_one_out_is_that_of_forty_fits(monkeypatch):
    """The chosen penalty is the best of refitting without each image."""
    from sampler.engine.inspection import probe as module

    g = torch.Generator().manual_seed(2)
    x, labels = torch.randn(40, 60, generator=g), torch.arange(40) % 3
    x[torch.arange(40), labels] += 1.5

    def right(penalty):
        z, y = ((x - x.mean(0)) / x.std(0)).double(), F.one_hot(labels).double()
        hits = 0
        for i in range(40):
            keep = torch.arange(40) != i
            a, b = z[keep], y[keep]
            middle, offset = a.mean(0), b.mean(0)
            normal = (a - middle).T @ (a - middle) + penalty * torch.eye(60).double()
            w = torch.linalg.solve(normal, (a - middle).T @ (b - offset))
            hits += int(((z[i] - middle) @ w + offset).argmax() == labels[i])
        return hits

    found = ridge_probe(x, labels).penalty
    z = ((x - x.mean(0)) / x.std(0)).double()
    scale = float((z @ z.T).trace() / 40)
    tried = {share * scale: right(share * scale) for share in module.PENALTIES}
    assert max(tried.values()) == tried[min(tried, key=lambda p: abs(p - found))]


def test_wilsons_interval():
    """The textbook case: 8 of 10."""
    found = wilson(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1
