"""Drop-in of Euler schedulers that are given x0: their pipelines hold and compute with x/alpha."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import sampler
from sampler.stock.over_alpha import OverAlpha
from tests import tiny
from tests.classic.table import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "StableDiffusionLatentUpscalePipeline"


def euler(**own):
    return EulerDiscreteScheduler(**tiny.BETAS, **{"prediction_type": "sample", **own})


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_only_those_that_are_given_x0_hold_it(kind):
    drop = sampler.scheduler("ab", euler(prediction_type=kind))
    assert (type(drop) is OverAlpha) == (kind == "sample") == drop.over_alpha
    assert type(sampler.scheduler("ddim", drop)) is type(drop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_part_is_that_of_the_stock_scheduler(spacing, dtype):
    stock = euler(timestep_spacing=spacing)
    drop = sampler.scheduler("ddim", stock)
    for one in (stock, drop):
        one.set_timesteps(6)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-3, "atol": 3e-3}
    assert drop.init_noise_sigma == pytest.approx(float(stock.init_noise_sigma), rel=1e-5)
    torch.testing.assert_close(drop.sigmas, stock.sigmas, rtol=1e-5, atol=1e-6)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    noised = [s.add_noise(noise / 2, noise, s.timesteps[[1, 3]]) for s in (drop, stock)]
    torch.testing.assert_close(*noised, **close)
    x = noise * stock.init_noise_sigma
    for one in (stock, drop):
        one.set_timesteps(6)
    for k, (t, own) in enumerate(zip(stock.timesteps, drop.timesteps, strict=True)):
        z = stock.scale_model_input(x, t)
        torch.testing.assert_close(drop.scale_model_input(x, own), z, **close)
        out = stock.scale_model_input(stock.sigmas[k], t)
        torch.testing.assert_close(drop.scale_model_input(drop.sigmas[k], own), out, **close)
        x0 = torch.tanh(2 * z)
        wanted = stock.step(x0, t, x).prev_sample
        torch.testing.assert_close(drop.step(x0, own, x).prev_sample, wanted, **close)
        x = wanted


@pytest.mark.parametrize("method", ["ddim", "ab"])
def test_half_precision_keeps_its_state_in_float32(method):
    found = []
    for dtype in (torch.float16, torch.float32):
        drop = sampler.scheduler(method, euler())
        drop.set_timesteps(20)
        x = torch.full((1, 4, 8, 8), 8.0, dtype=dtype)
        for k, t in enumerate(drop.timesteps[:12]):
            x = drop.step(0 * x + k % 4 / 4, t, x).prev_sample
        found.append(drop._x)
    assert found[0].dtype == torch.float32
    assert torch.allclose(*found, rtol=1e-6)


@pytest.fixture(scope="module")
def upscaler():
    recipe = TINY[NAME]
    return recipe, recipe.build(NAME)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_upscaler_makes_its_own_images_guided_and_not(upscaler, scale):
    recipe, pipe = upscaler
    stock, plain = pipe.scheduler, recipe.called(pipe, guidance_scale=scale)
    rule = {"name": "cfg", "scale": scale} if scale > 1 else "none"
    try:
        pipe.scheduler = sampler.scheduler("ddim", stock)
        alone = recipe.called(pipe, guidance_scale=scale)
        with sampler.guide(pipe, rule) as hook:
            guided = recipe.called(pipe, guidance_scale=scale)
        pipe.scheduler = sampler.scheduler("ghvb", stock)
        other = recipe.called(pipe, guidance_scale=scale)
    finally:
        pipe.scheduler = stock
    bar = 1e-5 * plain.abs().max()
    assert (alone - plain).abs().max() <= bar and (guided - plain).abs().max() <= bar
    assert hook.nfe == [3 * (1 + (scale > 1))]
    assert other.isfinite().all() and (other - plain).abs().max() > bar
    assert torch.equal(recipe.called(pipe, guidance_scale=scale), plain)


def test_a_rule_over_x0_is_the_same_with_both_schedulers(upscaler):
    recipe, pipe = upscaler
    rule = {"name": "apg", "scale": 3.0, "space": "eps", "norm_threshold": 3.0}
    stock = pipe.scheduler
    with sampler.guide(pipe, rule):
        wanted = recipe.called(pipe)
    try:
        pipe.scheduler = sampler.scheduler("ddim", stock)
        with sampler.guide(pipe, rule):
            found = recipe.called(pipe)
    finally:
        pipe.scheduler = stock
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
