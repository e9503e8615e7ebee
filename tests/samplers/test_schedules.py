"""Every sampler that moves on one evaluation, on the levels of every kind of schedule."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from sampler_kernels import leaves

import sampler
from sampler.core.schedule import Schedule
from tests.analytic import vp_grid
from tests.samplers.golden import arrays, mixture

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STOCK = {
    "ddim leading": DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False),
    "ddim trailing": DDIMScheduler(**BETAS, timestep_spacing="trailing"),
    "ddim linspace": DDIMScheduler(**BETAS, timestep_spacing="linspace"),
    "pndm": PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),  # stock repeats a timestep
    "euler": EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    "euler karras": EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "dpm": DPMSolverMultistepScheduler(**BETAS),
    "dpm karras": DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "dpm sigma_min": DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min"),
    "unipc": UniPCMultistepScheduler(**BETAS),
    "edm": EDMEulerScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
# name -> (spec, latents that its state may hold: r + 1 of a sum over r)
MOMENTUM = {
    "ab 4": ({"name": "ab", "order": 4}, 5),
    "ab 4 variable": ({"name": "ab", "order": 4, "steps": "variable"}, 5),
    "heavy_ball 3.8": ({"name": "heavy_ball", "momentum_number": 3.8}, 5),
    "heavy_ball dpmpp_2m": ({"name": "heavy_ball", "base": "dpmpp_2m", "beta": 0.8}, 3),
    "heavy_ball unipc": ({"name": "heavy_ball", "base": "unipc", "beta": 0.8}, 4),
    "ghvb 3.8": ({"name": "ghvb", "momentum_number": 3.8}, 5),
    "nesterov 2.8": ({"name": "nesterov", "momentum_number": 2.8}, 4),
    "dpmpp_2m": ("dpmpp_2m", 2),
    "unipc": ("unipc", 4),
    "ddim": ("ddim", 0),
}


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("kind", STOCK)
def test_exactly_the_steps_asked_for_and_no_level_twice(kind, steps):
    stock = STOCK[kind]
    levels = sampler.Schedule.from_config(stock.config, type(stock).__name__).grid(steps)
    ratios = [level.sigma / level.alpha if level.alpha else float("inf") for level in levels]
    assert len(levels) == steps + 1
    assert all(a > b for a, b in zip(ratios, ratios[1:], strict=False))
    if kind != "dpm karras":  # there the network is told rounded times, as the stock scheduler does
        assert len({level.t for level in levels[:-1]}) == steps


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("name", MOMENTUM)
def test_one_evaluation_per_step_on_every_schedule(name, kind):
    """The network sees each level once, in order, and the end is near where the ODE ends."""
    stock, seen, mix = STOCK[kind], [], mixture(arrays("reference_ode"))
    schedule = sampler.Schedule.from_config(stock.config, type(stock).__name__)
    levels = schedule.grid(30)

    def velocity(x, level, _):
        seen.append(level)
        eps, mean = mix.eps(x, level), mix.w @ mix.mu
        return eps - ((x - level.sigma * eps) / level.alpha if level.alpha else mean)

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x * schedule.initial_scale(levels)
    engine = sampler.Engine(sampler.denoiser(velocity, "velocity"))
    end = engine.run(x, levels, sampler=MOMENTUM[name][0])
    assert seen == list(levels[:-1])
    fine = engine.run(x, schedule.grid(400), sampler="ddim")
    assert (end - fine).norm() < 0.2 * fine.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MOMENTUM)
def test_a_half_precision_network_keeps_a_small_float32_state(name, dtype):
    """State and x are float32: the run differs from float32's by the network's rounding only."""
    spec, most = MOMENTUM[name]
    schedule = sampler.Schedule.from_config(STOCK["ddim leading"].config, "DDIMScheduler")
    levels, x = schedule.grid(12), torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = sampler.Engine(sampler.denoiser(lambda x, level, _: torch.tanh(x)))
    half = sampler.Engine(sampler.denoiser(lambda x, level, _: torch.tanh(x.to(dtype))))
    first, grid = half.start(x, levels, sampler=spec)
    for snap in half.steps(first, grid, sampler=spec):
        tensors = [t for t in leaves(snap.sampler) if isinstance(t, torch.Tensor)]
        latents = [t for t in tensors if t.shape == x.shape]
        assert len(latents) <= most
        assert all(t.dtype == torch.float32 for t in [snap.x, *tensors])
    exact = whole.run(x, levels, sampler=spec)
    assert (snap.x - exact).norm() < 30 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", ["ab 4", "heavy_ball 3.8", "ghvb 3.8", "nesterov 2.8", "unipc"])
def test_what_the_network_predicts_does_not_matter(name):
    """eps-, v- and x0-networks of one model: the velocity is begun after the conversion."""
    data = arrays("reference_ode")
    mix, spec = mixture(data), MOMENTUM[name][0]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ends = []
    for prediction in ("eps", "v", "x0"):
        engine = sampler.Engine(
            sampler.denoiser(lambda x, lv, _, p=prediction: mix.out(x, lv, p), prediction)
        )
        ends.append(engine.run(x, vp_grid(15), sampler=spec))
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() <= 1e-10 * ends[0].abs().max()


def test_a_flow_model_of_times_up_to_one_takes_any_number_of_steps():
    config = {"num_train_timesteps": 1, "shift": 1.0}  # Stable Audio 3, ACE-Step
    schedule = Schedule.from_config(config, "FlowMatchEulerDiscreteScheduler")
    assert [level.sigma for level in schedule.grid(4)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    given = schedule.grid(3, sigmas=[0.9, 0.5, 0.1])
    stock = FlowMatchEulerDiscreteScheduler(**config)
    stock.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    assert [v.sigma for v in given] == pytest.approx(stock.sigmas.tolist())
    assert [v.t for v in given[:-1]] == pytest.approx(stock.timesteps.tolist())
