"""Flow-matching schedulers with noise above 1 (Cosmos-Predict2) and with rising times (Mochi)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import sampler
from sampler.core.flow_schedules import BackwardFlow, NoisyFlow
from sampler.core.stock_schedule import schedule_of
from sampler.types import Branch, GuidanceBase
from tests.classic.recipe import Recipe
from tests.classic.stand_ins import stand_ins
from tests.classic.table import TINY
from tests.classic.videos import mochi

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "FlowMatchEulerDiscreteScheduler"
ENDS = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
RAMPS = ["karras", "exponential", "beta"]
APG = {"name": "apg", "scale": 3.0, "space": "x0", "norm_threshold": 3.0, "momentum": -0.5}


def noisy(ramp="karras", **own):
    stock = FlowMatchEulerDiscreteScheduler(**{f"use_{ramp}_sigmas": True} if ramp else {})
    stock.register_to_config(**{**ENDS, **own})
    return stock


def run_of(stock, steps, **given):
    """A stock scheduler's run, as Cosmos sets it."""
    stock.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64), **given)
    stock.sigmas[-1] = stock.sigmas[-2]
    return stock


@pytest.mark.parametrize("steps", (2, 3, 7, 35))
@pytest.mark.parametrize("ramp", RAMPS)
def test_noise_above_one(steps, ramp):
    if ramp == "beta":
        pytest.importorskip("scipy")
    stock = run_of(noisy(ramp), steps)
    schedule = schedule_of(dict(stock.config), NAME)
    assert type(schedule) is NoisyFlow and schedule.process == "edm"
    for grid in (schedule.grid(steps), schedule.grid(steps, sigmas=[0.0] * steps, mu=1.0)):
        np.testing.assert_allclose([v.sigma for v in grid], stock.sigmas, 1e-6)
        np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, 1e-6)
        assert {v.alpha for v in grid} == {1.0}
    for v in grid:
        assert schedule.level(v.t) == pytest.approx(v) == schedule.of_stock(v.t, v.sigma)
        assert schedule.time_of(v.sigma) == pytest.approx(v.t)
    ends = schedule_of({**stock.config, "final_sigmas_type": "zero"}, NAME).grid(steps)
    assert ends[:-1] == grid[:-1] and ends[-1] == (0, 1.0, 0.0)
    with pytest.raises(ValueError, match="2 sigmas are 2 steps, not"):
        schedule.grid(steps + 1, sigmas=[1.0, 0.5])


def test_the_ends_of_noise_above_one_are_needed():
    with pytest.raises(ValueError, match="sigma_min = None of levels up to sigma_max = 80"):
        sampler.scheduler("ddim", noisy(sigma_min=None))
    assert type(schedule_of(dict(noisy(None).config), NAME)) is sampler.Schedule
    assert type(schedule_of(dict(noisy(sigma_max=1.0).config), NAME)) is sampler.Schedule


@pytest.mark.parametrize("steps", (1, 2, 7, 30))
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("own", [False, True])
def test_rising_times(steps, options, own):
    stock = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, **options)
    sigmas = (np.linspace(1, 1 / steps, steps) ** 1.5).tolist() if own else None
    mu = 0.7 if "use_dynamic_shifting" in options else None
    stock.set_timesteps(None if own else steps, sigmas=sigmas, mu=mu)
    schedule = schedule_of(dict(stock.config), NAME)
    assert type(schedule) is BackwardFlow and schedule.rising
    grid = schedule.grid(steps, sigmas=sigmas, mu=mu)
    np.testing.assert_allclose([v.alpha for v in grid], stock.sigmas, atol=1e-6)
    np.testing.assert_allclose([v.sigma for v in grid], 1 - stock.sigmas, atol=1e-6)
    np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, atol=1e-3)
    for v in grid:
        assert schedule.level(v.t) == pytest.approx(v, abs=1e-9)
        assert schedule.of_stock(v.t, schedule.stock_sigma(v)) == pytest.approx(v, abs=1e-9)
        if v.alpha:
            assert schedule.time_of(v.sigma / v.alpha) == pytest.approx(v.t)
    drop = sampler.scheduler("ddim", stock)
    drop.set_timesteps(None if own else steps, sigmas=sigmas, mu=mu)
    torch.testing.assert_close(drop.sigmas, stock.sigmas)
    torch.testing.assert_close(drop.timesteps, stock.timesteps)


def test_a_step_of_rising_times_is_the_stock_one():
    stock = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    drop = sampler.scheduler("ddim", stock)
    x, out = torch.randn(2, 2, 3, 4)
    for one in (stock, drop):
        one.set_timesteps(5)
    for t, own in zip(stock.timesteps, drop.timesteps, strict=True):
        wanted = stock.step(out, t, x, return_dict=False)[0]
        torch.testing.assert_close(drop.step(out, own, x, return_dict=False)[0], wanted)
        x = wanted
    level = drop._grid[2]
    pred = drop.schedule.predict(x, out, level)
    torch.testing.assert_close(sampler.settle(pred.x0), x + level.sigma * out)
    torch.testing.assert_close(sampler.settle(drop.schedule.output_of(x, pred, level)), out)


def test_what_rising_times_do_not_go_with_is_refused():
    stock = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    drop = sampler.scheduler("ddim", stock)
    with pytest.raises(ValueError, match=r"rise to the image \(invert_sigmas\); give sigmas"):
        drop.set_timesteps(timesteps=[0.0, 500.0])
    with pytest.raises(ValueError, match="timesteps of this model rise to the image, so a list"):
        sampler.scheduler("ddim", stock, grid={"timesteps": [900, 500, 100]})
    grid = sampler.scheduler("ddim", stock, grid={"sigmas": [0.9, 0.5, 0.1]})
    grid.set_timesteps(3)
    torch.testing.assert_close(grid.timesteps, torch.tensor([100.0, 500.0, 900.0]))
    stock.register_to_config(**ENDS)
    with pytest.raises(ValueError, match="invert_sigmas = True with sigma_max = 80 is not"):
        sampler.scheduler("ddim", stock)
    with pytest.raises(ValueError, match="invert_sigmas = True is not supported"):
        sampler.Schedule.from_config({"invert_sigmas": True}, NAME)  # adapters' models fall


def test_sigmas_that_a_pipeline_changes_otherwise_are_refused():
    drop = sampler.scheduler("ab", noisy())
    x = torch.randn(1, 4, 8, 8)
    run_of(drop, 4)
    drop.step(x, drop.timesteps[0], x)
    run_of(drop, 4)
    drop.sigmas[1] = 3.0
    with pytest.raises(ValueError, match="changes the sigmas of its scheduler, which a drop-in"):
        drop.step(x, drop.timesteps[0], x)


def backwards():
    own = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return Recipe(lambda: {**mochi(), "scheduler": own}, {"num_frames": 7})


RECIPES = {
    "LongCatAudioDiTPipeline": TINY["LongCatAudioDiTPipeline"],
    "MochiPipeline": backwards(),
    "Cosmos2TextToImagePipeline": TINY["Cosmos2TextToImagePipeline"],
}


@pytest.fixture(scope="module", params=RECIPES)
def tiny_pipe(request):
    recipe = RECIPES[request.param]
    return recipe, recipe.build(request.param)


def close(found, wanted):
    return (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_drop_in_makes_the_pipelines_own_images(tiny_pipe):
    recipe, pipe = tiny_pipe
    stock, plain = pipe.scheduler, recipe.called(pipe)
    try:
        pipe.scheduler = sampler.scheduler("ddim", stock)
        assert close(recipe.called(pipe), plain)
        pipe.scheduler = sampler.scheduler("ab", stock)
        other = recipe.called(pipe)
        assert other.isfinite().all() and not close(other, plain)
    finally:
        pipe.scheduler = stock
    assert torch.equal(recipe.called(pipe), plain)


def test_a_rule_over_x0_is_the_same_with_both_schedulers(tiny_pipe):
    """The stock scheduler and the drop-in tell the rule one x0, of rising times as of others."""
    recipe, pipe = tiny_pipe
    stock, plain = pipe.scheduler, recipe.called(pipe)
    with sampler.guide(pipe, APG):
        found = recipe.called(pipe)
    try:
        pipe.scheduler = sampler.scheduler("ddim", stock)
        with sampler.guide(pipe, APG):
            assert close(recipe.called(pipe), found)
    finally:
        pipe.scheduler = stock
    assert not close(found, plain)


@dataclass(frozen=True)
class Seen(GuidanceBase):
    """Rule of one branch that keeps x and x0 of every step."""

    kept: Any

    name: ClassVar[str] = "seen"
    needs: ClassVar[frozenset[str]] = frozenset({"cond"})

    def plan(self, x, span, cond, state):
        return {"cond": Branch(cond.cond)}

    def combine(self, x, preds, span, state):
        self.kept.append((x, sampler.settle(preds["cond"].x0)))
        return preds["cond"], state


def test_rules_are_told_the_x0_of_rising_times():
    name = "LongCatAudioDiTPipeline"
    pipe, answers, kept = RECIPES[name].build(name), [], []
    handle = pipe.transformer.register_forward_hook(lambda *given: answers.append(given[-1].sample))
    with sampler.guide(pipe, Seen(kept)):
        RECIPES[name].called(pipe, guidance_scale=1.0)
    handle.remove()
    assert len(kept) == len(answers) == 3
    shares = pipe.scheduler.sigmas.tolist()  # of the image, from 0
    for (x, x0), out, share in zip(kept, answers, shares, strict=False):
        torch.testing.assert_close(x0, x + (1 - share) * out)


def test_a_hosted_run_is_the_stock_run(tiny_pipe):
    recipe, pipe = tiny_pipe
    cls = type(pipe)
    own = {k: v for k, v in recipe.settings(cls).items() if k not in ("guidance_scale", "prompt")}
    own |= recipe.inputs(cls)
    scale = 3.0 + cls.__name__.startswith("Cosmos")
    size = {k: own.pop(k) for k in ("height", "width") if k in own}
    negative, steps = own.pop("negative_prompt"), own.pop("num_inference_steps")
    sound = "Audio" in cls.__name__
    own.pop("output_type")
    with stand_ins(cls):
        stock = pipe(
            prompt=["a fox"],
            negative_prompt=[negative],
            guidance_scale=3.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(4),
            output_type="np" if sound else "latent",
            **size,
            **own,
        )
        result = sampler.load(pipe).generate(
            "a fox",
            negative=negative,
            seeds=4,
            steps=steps,
            sampler="ddim",
            guidance={"name": "cfg", "scale": scale},
            inputs=own,
            output="pil" if sound else "latent",
            **size,
        )
    wanted = torch.as_tensor(next(iter(stock.values())))
    found = torch.as_tensor(result.images[0]) if sound else result.latents
    assert result.nfe == [2 * steps] and close(found.reshape(wanted.shape), wanted)
