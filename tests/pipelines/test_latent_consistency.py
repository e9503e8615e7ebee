"""Networks that take the guidance scale as an input: the engine against stock pipelines."""

import copy

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from diffusers.schedulers import scheduling_lcm

import sampler
from sampler.core.noise import Noise
from sampler.pipelines import adapt
from sampler.pipelines.stable_diffusion import scale_embedding
from tests import tiny

PROMPTS = ["a red fox", "two green apples", "the sea at night"]
SEEDS = [7, 8, 9]
SIZE = {"height": 24, "width": 40}


def lcm(prediction="epsilon", size=16, **options):
    """A tiny latent consistency model."""
    parts = dict(tiny.sd(time_cond=size).components)
    scheduler = LCMScheduler(**tiny.BETAS, prediction_type=prediction, **options)
    pipe = LatentConsistencyModelPipeline(
        **{**parts, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, steps, scale, monkeypatch, output):
    """Run the stock call with our noise between the steps."""
    drawn = iter(range(steps))

    def noise(shape, **_):
        return Noise(SEEDS).draw(next(drawn), torch.empty(shape))

    with monkeypatch.context() as patch:
        patch.setattr(scheduling_lcm, "randn_tensor", noise)
        return copy.deepcopy(pipe)(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
            output_type=output,
            **SIZE,
        ).images


def ours(pipe, steps, scale, output, **options):
    rule = {"name": "embedded", "scale": scale}
    engine = sampler.load(pipe)
    return engine.generate(
        PROMPTS, seeds=SEEDS, steps=steps, guidance=rule, output=output, **SIZE, **options
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_latents_and_images_are_the_stock_pipelines(prediction, steps, monkeypatch):
    pipe = lcm(prediction)
    wanted = stock(pipe, steps, 8.0, monkeypatch, "latent")
    made = ours(pipe, steps, 8.0, "latent")
    torch.testing.assert_close(made.latents, wanted, rtol=1e-4, atol=1e-5)
    assert made.nfe == [steps] * 3  # one row per step: no unconditional branch
    images = ours(pipe, steps, 8.0, "tensor").images
    torch.testing.assert_close(
        images, stock(pipe, steps, 8.0, monkeypatch, "pt"), rtol=1e-4, atol=1e-5
    )
    # The comparison sees the scale.
    other = ours(pipe, steps, 2.0, "latent").latents
    assert (other - wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("size", [16, 17, 256])
def test_the_embedding_is_that_of_diffusers(size):
    scales = torch.tensor([1.0, 3.0, 8.5])
    wanted = lcm().get_guidance_scale_embedding(scales - 1, size)
    assert torch.equal(scale_embedding(scales, size), wanted)


def test_the_defaults_are_those_of_the_stock_pipeline(monkeypatch):
    pipe = lcm()
    engine = sampler.load(pipe)
    assert engine.sampler.name == "consistency"
    assert sampler.registry.spec_of(engine.guidance) == {"name": "embedded", "scale": 8.5}
    plain = engine.generate(PROMPTS, seeds=SEEDS, steps=4, output="latent", **SIZE)
    wanted = stock(pipe, 4, 8.5, monkeypatch, "latent")
    torch.testing.assert_close(plain.latents, wanted, rtol=1e-4, atol=1e-5)
    # Rules that say nothing of the scale leave the network with that default.
    bare = engine.generate(PROMPTS, seeds=SEEDS, steps=4, guidance="none", output="latent", **SIZE)
    assert torch.equal(bare.latents, plain.latents)
    again = engine.generate(**plain.config)
    assert torch.equal(again.latents, plain.latents)


@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize("origin", [50, 20, 12])
def test_the_grid_is_the_stock_schedulers(steps, origin):
    scheduler = LCMScheduler(**tiny.BETAS, original_inference_steps=origin)
    schedule = sampler.Schedule.from_config(scheduler.config, "LCMScheduler")
    scheduler.set_timesteps(steps)
    grid = schedule.grid(steps)
    assert [level.t for level in grid[:-1]] == scheduler.timesteps.tolist()
    assert grid[-1] == (0, 1.0, 0.0)
    with pytest.raises(ValueError, match=rf"must lie in 1\.\.{origin}"):
        schedule.grid(origin + 1)


@pytest.mark.parametrize("t", [0, 1, 19, 259, 999])
def test_boundary_factors_are_the_stock_schedulers(t):
    scheduler = LCMScheduler(**tiny.BETAS)
    schedule = sampler.Schedule.from_config(scheduler.config, "LCMScheduler")
    x, out = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    level = schedule.level(t)
    plain = sampler.Prediction.of("eps", x, out, level).x0.tensor()
    skip, keep = scheduler.get_scalings_for_boundary_condition_discrete(t)
    found = schedule.predict(x, out, level).x0.tensor()
    torch.testing.assert_close(found, keep * plain + skip * x)
    if t == 0:  # a consistency model maps clean samples to themselves
        assert torch.equal(found, x)


def test_stable_diffusion_with_a_scale_input_is_the_stock_pipeline():
    pipe = tiny.sd(time_cond=8)
    engine = sampler.load(pipe)
    assert engine.sampler.name == "ddim" and engine.guidance.name == "embedded"
    made = engine.generate(
        PROMPTS, seeds=SEEDS, steps=5, guidance={"name": "embedded", "scale": 4.0},
        output="latent", **SIZE,
    )  # fmt: skip
    wanted = copy.deepcopy(pipe)(
        PROMPTS, num_inference_steps=5, guidance_scale=4.0, output_type="latent", **SIZE,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    assert torch.equal(made.latents, wanted)


def test_what_does_not_fit_is_one_sentence():
    rule = {"name": "embedded", "scale": 3.0}
    with pytest.raises(ValueError, match="does not take the guidance scale"):
        sampler.load(tiny.sd()).generate("a fox", guidance=rule, steps=2, **SIZE)
    with pytest.raises(ValueError, match="does not take the guidance scale"):
        sampler.load(tiny.pixart()).generate("a fox", guidance=rule, steps=2, **SIZE)
    with pytest.raises(ValueError, match="scale"):
        sampler.build("guidance", {"name": "embedded", "scale": -1.0})
    levels = [sampler.Level(900, 0.3, 0.95), sampler.Level(0, 1.0, 0.0)]
    bare = sampler.Engine(sampler.denoiser(lambda x, level, cond: x))
    with pytest.raises(ValueError, match="carry no scale"):
        bare.run(torch.zeros(1, 4), levels, guidance=rule)
    engine = sampler.load(lcm())
    with pytest.raises(ValueError, match="negative prompt"), pytest.warns(UserWarning):
        engine.generate("a fox", negative="blurry", steps=2, **SIZE)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.50"):
        engine.generate("a fox", steps=51, **SIZE)


def test_classifier_free_guidance_on_top_has_two_branches():
    engine = sampler.load(lcm())
    rule = {"name": "cfg", "scale": 2.0}
    made = engine.generate("a fox", steps=2, guidance=rule, output="latent", **SIZE)
    assert made.nfe == [4]
    assert adapt(lcm()).default_guidance == {"name": "embedded", "scale": 8.5}
