"""Schedulers in continuous time, of flow maps and of consistency models behind a drop-in.

The network is exact for Gaussian data N(MEAN, DEVIATION²), at the levels and in the
parametrisation of the stock scheduler, so the ODE has a known solution:

    x_t = a·mean + sqrt(a²·deviation² + s²)·z,   z constant along it
"""

import functools
import importlib
import math
import warnings

import diffusers
import pytest
import torch

import sampler
from sampler.core.stock_schedule import schedule_of
from sampler.engine.hosted_pipeline import HostedPipeline
from tests import tiny
from tests.classic.table import TINY

MEAN, DEVIATION = 0.7, 0.4
SVD = {"prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
       "timestep_spacing": "leading", "timestep_type": "continuous",
       "use_karras_sigmas": True}  # fmt: skip


def expected(x, a, s):
    """E[x0 | x] of the data at x = a·x0 + s·eps."""
    return MEAN + DEVIATION**2 * a / (a * a * DEVIATION**2 + s * s) * (x - a * MEAN)


def trig(stock, index):
    t = stock.timesteps[index].item()
    a, s = max(math.cos(t), 0), math.sin(t)
    deviation = stock.config.sigma_data
    return a, s * deviation, lambda x, x0: (a * x - x0) / s


def cosine(stock, index):
    bar = stock._alpha_cumprod(stock.timesteps[index][None], "cpu").item()
    a, s = bar**0.5, (1 - bar) ** 0.5
    return a, s, lambda x, x0: (x - a * x0) / s


def flow(stock, index):
    s = stock.sigmas[index].item()
    return 1 - s, s, lambda x, x0: (x - x0) / max(s, 1e-9)


def karras(stock, index):
    s = stock.sigmas[index].item()
    return 1.0, s, lambda x, x0: (x / (s * s + 1) - x0) * (s * s + 1) ** 0.5 / max(s, 1e-9)


def boundary(stock, index):
    at = stock.sigmas[index].clamp_min(stock.config.sigma_min)
    skip, out = stock.get_scalings_for_boundary_condition(at)
    s = math.sqrt(max(at.item() ** 2 - stock.config.sigma_min**2, 0))
    return 1.0, s, lambda x, x0: (x0 - skip * x) / out


CONSISTENCY = {"num_train_timesteps": 400, "clip_denoised": False}
CASES = {
    "SCMScheduler": ({}, trig, {"max_timesteps": 1.5708, "intermediate_timesteps": None}),
    "DDPMWuerstchenScheduler": ({}, cosine, {}),
    "FlowMapEulerDiscreteScheduler": ({"shift": 3.0}, flow, {}),
    "HeliosScheduler": ({"stages": 1}, flow, {}),
    "EulerDiscreteScheduler": (SVD, karras, {}),
    "CMStochasticIterativeScheduler": (CONSISTENCY, boundary, {}),
}


def solved(name, method, steps):
    """(result, exact solution) of a run of a drop-in from a fixed z."""
    config, process, given = CASES[name]
    stock = getattr(diffusers, name)(**config)
    stock.set_timesteps(steps, **given)
    drop = sampler.scheduler(method, stock)
    drop.set_timesteps(steps, **given)
    assert torch.allclose(drop.timesteps.double(), stock.timesteps.double(), atol=1e-4)
    z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def exact(index):
        a, s, _ = process(stock, index)
        return a * MEAN + math.sqrt(a * a * DEVIATION**2 + s * s) * z

    x = exact(0)
    for index in range(steps):
        a, s, answer = process(stock, index)
        t = drop.timesteps[index]
        if scaled := getattr(stock, "scale_model_input", None):
            stock._step_index = index  # which its own step would count
            ours, theirs = drop.scale_model_input(x, t), scaled(x, stock.timesteps[index])
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5)
        x = drop.step(answer(x, expected(x, a, s)), t, x).prev_sample
    closed = len(stock.timesteps) > steps
    return x, exact(steps) if closed or name[:2] == "CM" else MEAN + DEVIATION * z


@pytest.mark.filterwarnings("ignore:A flow map answers")
@pytest.mark.parametrize("method", ["ddim", "ab", "ghvb"])
@pytest.mark.parametrize("name", CASES)
def test_runs_converge_to_the_solution_of_the_stock_process(name, method):
    coarse, fine = (
        float((found - exact).abs().max())
        for found, exact in (solved(name, method, steps) for steps in (25, 100))
    )
    assert fine < 0.07 and (fine < 0.5 * coarse or fine < 1e-3)


@pytest.mark.filterwarnings("ignore:A flow map answers")
@pytest.mark.parametrize("name", CASES)
def test_a_second_order_method_is_nearer_than_ddim(name):
    ddim, ab = (
        float((found - exact).abs().max())
        for found, exact in (solved(name, method, 100) for method in ("ddim", "ab"))
    )
    assert ab < 0.6 * ddim


def test_noise_has_the_standard_deviation_of_the_data():
    stock = diffusers.SCMScheduler(sigma_data=0.25)
    drop = sampler.scheduler("consistency", stock)
    drop.set_timesteps(2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    assert drop.timesteps.tolist() == pytest.approx([1.57080, 1.3, 0])
    x = torch.zeros(1, 4, 64, 64)
    x, x0 = drop.step(x, drop.timesteps[0], x, generator=None, return_dict=False)
    assert not x0.any() and float(x.std()) == pytest.approx(0.25 * math.sin(1.3), rel=0.02)
    x, x0 = drop.step(x, drop.timesteps[1], x, generator=None, return_dict=False)
    assert torch.equal(x, x0)


def test_timesteps_in_the_precision_of_the_network_are_those_of_the_run():
    drop = sampler.scheduler("ab", diffusers.DDPMWuerstchenScheduler())
    assert isinstance(drop, diffusers.DDPMWuerstchenScheduler)
    drop.set_timesteps(20)
    x = torch.ones(2, 4, 8, 8)
    for t in drop.timesteps[:-1]:
        x = drop.step(x, t.expand(2).to(torch.bfloat16), x).prev_sample
    with pytest.raises(ValueError, match="not the next one of this run"):
        drop.step(x, drop.timesteps[:1].expand(2), x)


def test_times_of_closed_schedulers():
    drop = sampler.scheduler("ddim", diffusers.SCMScheduler())
    drop.set_timesteps(timesteps=[1.5, 0.5, 0.0])
    assert drop.timesteps.tolist() == [1.5, 0.5, 0.0] and drop.num_inference_steps == 2
    with pytest.raises(ValueError, match="must have one more entry, 0, at their end"):
        drop.set_timesteps(timesteps=[1.5, 0.5])
    with pytest.raises(ValueError, match="is the second time of two steps; set it to None for 3"):
        drop.set_timesteps(3, max_timesteps=1.57080, intermediate_timesteps=1.3)
    with pytest.raises(ValueError, match="must lie in 0..1"):
        sampler.scheduler("ddim", diffusers.DDPMWuerstchenScheduler()).schedule.level(1.5)


@pytest.mark.parametrize("steps, origin, strength", [(4, 50, 1.0), (3, 40, 0.7), (8, None, 0.5)])
def test_latent_consistency_models_choose_from_their_timesteps(steps, origin, strength):
    stock = diffusers.LCMScheduler()
    drop = sampler.scheduler("consistency", stock)
    for scheduler in (stock, drop):
        scheduler.set_timesteps(steps, original_inference_steps=origin, strength=strength)
    assert drop.timesteps.tolist() == stock.timesteps.tolist()
    with pytest.raises(ValueError, match="must lie in 1..5: original_inference_steps = 50 times"):
        drop.set_timesteps(6, strength=0.1)
    with pytest.raises(ValueError, match="exclude each other"):
        sampler.scheduler("ddim", stock, grid="karras").set_timesteps(4, strength=0.5)


def test_latent_consistency_models_give_their_estimate_of_x0():
    stock, x = diffusers.LCMScheduler(), torch.ones(1, 4, 8, 8)
    drop = sampler.scheduler("consistency", stock)
    for scheduler in (stock, drop):
        scheduler.set_timesteps(2)
    for index, t in enumerate(stock.timesteps):
        given = [s.step(x / 2, t, x, return_dict=False) for s in (stock, drop)]
        assert torch.allclose(given[0][1], given[1][1], atol=1e-5)
        assert torch.equal(*given[1]) == (index == 1)


@pytest.mark.parametrize("name", ["KarrasVeScheduler", "ScoreSdeVeScheduler", "AmusedScheduler"])
def test_schedulers_without_levels_say_why(name):
    with pytest.raises(ValueError, match=f"{name} has no levels that a sampler could step on: "):
        schedule_of({}, name)


def test_repaint_goes_up_and_stays():
    with pytest.raises(
        ValueError, match="RePaintScheduler stays where it is: RePaintPipeline goes"
    ):
        sampler.scheduler("ddim", diffusers.RePaintScheduler())


@pytest.mark.parametrize(
    "change", [{"prediction_type": "epsilon"}, {"final_sigmas_type": "sigma_min"}]
)
def test_other_continuous_times_are_refused(change):
    with pytest.raises(ValueError, match="timestep_type = 'continuous' is supported for"):
        sampler.scheduler("ddim", diffusers.EulerDiscreteScheduler(**{**SVD, **change}))


def test_stages_of_helios_are_refused():
    with pytest.raises(ValueError, match="HeliosScheduler: stages = 3 is not supported"):
        sampler.scheduler("ddim", diffusers.HeliosScheduler())


def test_flow_maps_give_the_velocity_at_a_level_to_samplers_that_take_it_for_one(monkeypatch):
    recipe, seen = TINY["AnyFlowPipeline"], []
    pipe = recipe.build("AnyFlowPipeline")
    inner = type(pipe.transformer).forward

    @functools.wraps(inner)
    def forward(self, *args, **given):
        seen.append(torch.equal(given["timestep"], given["r_timestep"]))
        return inner(self, *args, **given)

    monkeypatch.setattr(type(pipe.transformer), "forward", forward)
    engine = sampler.load(pipe)
    for name in ("ddim", "ab"):
        engine.generate("a fox", seeds=1, steps=2, sampler=name, inputs={"num_frames": 5},
                        height=32, width=32)  # fmt: skip
    assert len(seen) > 3 and seen == sorted(seen) and not seen[0] and seen[-1]
    with pytest.warns(UserWarning, match="A flow map answers with the mean velocity of a step"):
        sampler.scheduler("ab", pipe.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.scheduler("ddim", pipe.scheduler)


@pytest.mark.parametrize("name", ["SanaSprintPipeline", "LatentConsistencyModelPipeline"])
def test_hosted_consistency_models_are_sampled_as_such(name):
    pipe = TINY[name].build(name)
    assert HostedPipeline(pipe).default_sampler == "consistency"


@pytest.mark.parametrize("name", ["StableCascadeDecoderPipeline", "LatentConsistencyModelPipeline"])
def test_saved_and_loaded_with_its_pipeline(name, tmp_path):
    recipe = TINY[name]
    pipe = recipe.build(name)
    pipe.scheduler = sampler.scheduler("ab", pipe.scheduler)
    pipe.scheduler.save_pretrained(tmp_path)
    module = importlib.import_module(type(pipe.scheduler).__module__)
    assert issubclass(type(pipe.scheduler), module.SchedulerMixin)  # by which diffusers loads it
    before = recipe.called(pipe)
    pipe.scheduler = type(pipe.scheduler).from_pretrained(tmp_path)
    assert torch.equal(recipe.called(pipe), before)


def test_rules_see_the_sample_of_a_drop_in_as_the_engine_does():
    """The stock Euler scheduler holds x/alpha, and its drop-in x."""
    pipe = tiny.sd()
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
    call = {"seeds": 1, "steps": 3, "height": 32, "width": 32, "output": "latent",
            "guidance": {"name": "apg", "scale": 5.0, "space": "x0",
                         "norm_threshold": 2.0}}  # fmt: skip
    engine = sampler.load(pipe)
    wanted = engine.generate("a fox", **call).latents
    hosted = engine.as_hosted().generate("a fox", **call).latents
    assert torch.allclose(hosted, wanted, atol=1e-5 * float(wanted.abs().max()))
