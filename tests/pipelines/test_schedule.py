"""Schedule's grids against the timesteps and sigmas of the stock schedulers."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sampler import Level, Schedule
from sampler.core.grids import dynamic_mu
from tests.tiny import BETAS

STEPS = (1, 2, 7, 20, 30, 50, 250)


def ours(scheduler, steps, **options):
    """The grid of a stock scheduler's configuration, after a trip through JSON."""
    config = json.loads(json.dumps(dict(scheduler.config)))
    schedule = Schedule.from_config(config, type(scheduler).__name__)
    return schedule, schedule.grid(steps, **options)


def ratios(grid):
    return [level.sigma / level.alpha if level.alpha else math.inf for level in grid]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("beta", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_grid_has_the_stock_timesteps_and_alphas_to_the_bit(steps, spacing, beta, zero_snr):
    stock = DDIMScheduler(
        **{**BETAS, "beta_schedule": beta},
        prediction_type="v_prediction",
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_snr,
        steps_offset=1,
    )
    stock.set_timesteps(steps)
    _, grid = ours(stock, steps)
    assert [level.t for level in grid[:-1]] == stock.timesteps.tolist()
    acp = stock.alphas_cumprod[stock.timesteps]
    assert torch.equal(torch.tensor([v.alpha for v in grid[:-1]]), acp**0.5)
    assert torch.equal(torch.tensor([v.sigma for v in grid[:-1]]), (1 - acp) ** 0.5)
    assert grid[-1] == Level(0, 1.0, 0.0)


def test_the_next_level_is_stock_ddims_previous_timestep_where_that_is_self_consistent():
    for spacing, steps in (("leading", 7), ("leading", 20), ("trailing", 20), ("trailing", 50)):
        stock = DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=0)
        _, grid = ours(stock, steps)
        times = [level.t for level in grid]
        assert times[1:-1] == [t - 1000 // steps for t in times[:-2]]
    # ... and is the true next one where it is not: 1000 = 7 * 142 + 6.
    _, grid = ours(DDIMScheduler(**BETAS, timestep_spacing="trailing"), 7)
    gaps = {a.t - b.t for a, b in zip(grid[:-2], grid[1:-1], strict=True)}
    assert gaps == {142, 143}


def test_the_last_level_follows_set_alpha_to_one():
    stock = DDIMScheduler(**BETAS, set_alpha_to_one=False)
    _, grid = ours(stock, 10)
    assert torch.tensor(grid[-1].alpha) == stock.final_alpha_cumprod**0.5
    assert ours(stock, 10, final="zero")[1][-1] == Level(0, 1.0, 0.0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_sigma_unit_grids(steps, spacing, karras, kind):
    stock = kind(**BETAS, timestep_spacing=spacing, use_karras_sigmas=karras, steps_offset=1)
    stock.set_timesteps(steps)
    schedule, grid = ours(stock, steps)
    np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, rtol=2e-6, atol=2e-4)
    np.testing.assert_allclose(ratios(grid), stock.sigmas, rtol=2e-6)
    np.testing.assert_allclose([v.alpha**2 + v.sigma**2 for v in grid], 1, rtol=1e-6)
    # x = alpha·(stock's x), at the first level.
    start = float(stock.init_noise_sigma) * grid[0].alpha
    assert schedule.initial_scale(grid) == pytest.approx(start, rel=1e-6)


def test_euler_ends_of_karras_ramp_and_zero_snr():
    stock = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, sigma_min=0.05, sigma_max=9.0)
    stock.set_timesteps(8)
    np.testing.assert_allclose(ratios(ours(stock, 8)[1]), stock.sigmas, rtol=2e-6)
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stock = EulerDiscreteScheduler(**BETAS, **options, final_sigmas_type="sigma_min")
    stock.set_timesteps(8)
    np.testing.assert_allclose(ratios(ours(stock, 8)[1]), stock.sigmas, rtol=2e-6)


def test_heun_levels_are_euler_levels():
    stock = HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    stock.set_timesteps(9)
    _, grid = ours(stock, 9)
    np.testing.assert_allclose(ratios(grid)[:-1], [*stock.sigmas[:1], *stock.sigmas[1:-1:2]], 2e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_open_ended_grids(steps, spacing, final, kind):
    stock = kind(**BETAS, timestep_spacing=spacing, final_sigmas_type=final, steps_offset=1)
    stock.set_timesteps(steps)
    _, grid = ours(stock, steps)
    assert [level.t for level in grid[:-1]] == stock.timesteps.tolist()
    np.testing.assert_allclose(ratios(grid), stock.sigmas, rtol=2e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_open_ended_karras_rounds_what_the_network_is_told(steps, kind):
    stock = kind(**BETAS, use_karras_sigmas=True)
    stock.set_timesteps(steps)
    _, grid = ours(stock, steps)
    assert [level.t for level in grid[:-1]] == stock.timesteps.tolist()
    np.testing.assert_allclose(ratios(grid), stock.sigmas, rtol=2e-6)


def test_pndm_levels():
    stock = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    stock.set_timesteps(20)
    _, grid = ours(stock, 20)
    assert [level.t for level in grid[:-1]] == stock._timesteps[::-1].tolist()
    assert grid[-1].t == 0 and grid[-1].sigma > 0


@pytest.mark.parametrize("steps", (1, 2, 3, 20))
@pytest.mark.parametrize("ramp", ["karras", "exponential"])
@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_edm(steps, ramp, kind, final):
    options = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.7, "final_sigmas_type": final}
    stock = kind(sigma_schedule=ramp, **options)
    stock.set_timesteps(steps)
    schedule, grid = ours(stock, steps)
    if steps == 1 and ramp == "exponential":  # stock starts at the least noise, its x at the most
        assert grid[0].sigma == 40 and stock.sigmas[0] == pytest.approx(0.01)
    else:
        np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([v.sigma for v in grid[:-1]], stock.sigmas[:-1], rtol=1e-5)
    assert grid[-1].sigma == (0 if final == "zero" else 0.01)
    assert {v.alpha for v in grid} == {1.0}
    assert schedule.initial_scale(grid) == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)
    x, out = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    level = grid[0]
    wanted = stock.precondition_outputs(x, out, torch.tensor(level.sigma))
    torch.testing.assert_close(schedule.predict(x, out, level).x0.tensor(), wanted)
    scaled = x * schedule.network_input(level)
    torch.testing.assert_close(scaled, stock.precondition_inputs(x, torch.tensor(level.sigma)))


@pytest.mark.parametrize("steps", STEPS)
def test_ipndm(steps):
    stock = IPNDMScheduler()
    stock.set_timesteps(steps)
    schedule, grid = ours(stock, steps)
    np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, atol=5e-6)
    np.testing.assert_allclose([v.alpha for v in grid], stock.alphas, atol=5e-6)
    np.testing.assert_allclose([v.sigma for v in grid], stock.betas, atol=5e-6)
    assert grid[0] == Level(1.0, 0.0, 1.0) and schedule.prediction == "v"
    assert schedule.initial_scale(grid) == stock.init_noise_sigma
    for level in grid[1:]:
        assert schedule.level(level.t) == pytest.approx(level)


def test_named_grids_of_an_exponential_model_walk_its_own_levels():
    _, plain = ours(EDMEulerScheduler(sigma_schedule="exponential"), 8)
    schedule, grid = ours(EDMEulerScheduler(sigma_schedule="exponential"), 8, spacing="karras")
    assert grid == schedule.edm({}).grid(8) != plain
    assert ours(EDMEulerScheduler(), 8, spacing="exponential")[1] == plain
    simple = schedule.grid(4, spacing="simple")
    wanted = schedule.grid(1000)
    assert [v.sigma for v in simple[:-1]] == pytest.approx([v.sigma for v in wanted[:-1:250]])


@pytest.mark.parametrize("steps", (1, 2, 20, 50))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_with_a_static_shift(steps, shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    _, grid = ours(stock, steps)
    assert [v.t for v in grid[:-1]] == stock.timesteps.tolist()
    assert [v.sigma for v in grid] == stock.sigmas.tolist()
    assert all(v.alpha == pytest.approx(1 - v.sigma, abs=1e-12) for v in grid)


@pytest.mark.parametrize("steps", (2, 20))
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("own", [False, True])
def test_flow_with_a_dynamic_shift(steps, kind, terminal, own):
    stock = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    sigmas = np.linspace(1, 1 / steps, steps).tolist() if own else None
    stock.set_timesteps(None if own else steps, mu=0.8, sigmas=sigmas)
    schedule, grid = ours(stock, steps, mu=0.8, sigmas=sigmas)
    assert [v.sigma for v in grid] == stock.sigmas.tolist()
    assert [v.t for v in grid[:-1]] == stock.timesteps.tolist()
    with pytest.raises(ValueError, match="give mu"):
        schedule.grid(steps)


def test_unipc_flow_configuration():
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    stock = UniPCMultistepScheduler(**options)
    stock.set_timesteps(12)
    # Stock takes 1e-6 off the first sigma.
    _, grid = ours(stock, 12)
    np.testing.assert_allclose([v.sigma for v in grid], stock.sigmas, atol=2e-6)


def test_dynamic_mu_is_linear_through_the_two_given_points():
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5}
    assert dynamic_mu(256, config) == pytest.approx(0.5)
    assert dynamic_mu(4096, config) == pytest.approx(1.15)
    assert dynamic_mu(2176, {**config, "max_shift": 1.5}) == pytest.approx(1.0)


def test_prediction_types_are_read():
    for stock, kind in (
        ("epsilon", "eps"),
        ("v_prediction", "v"),
        ("sample", "x0"),
    ):
        scheduler = DDIMScheduler(**BETAS, prediction_type=stock)
        assert Schedule.from_config(scheduler.config, "DDIMScheduler").prediction == kind


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.1000"):
        Schedule.vp(BETAS).grid(steps)


def test_an_open_end_needs_one_training_step_more():
    schedule = Schedule.vp(BETAS, "DPMSolverMultistepScheduler")
    assert len({level.t for level in schedule.grid(999)[:-1]}) == 999
    with pytest.raises(ValueError, match=r"1\.\.999"):
        schedule.grid(1000)


def test_no_signal_and_eps_is_refused_with_the_way_out():
    config = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = Schedule.vp(config)
    with pytest.raises(ValueError, match="spacing='leading'"):
        schedule.grid(10)
    assert schedule.grid(10, spacing="leading")[0].alpha > 0


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}),
        (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_karras_sigmas": True},
        ),
        ("EDMEulerScheduler", {"sigma_schedule": "polyexponential"}),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "sample"}),
        ("IPNDMScheduler", {"trained_betas": [0.1, 0.2]}),
    ],
)
def test_levels_that_are_not_known_are_refused(name, extra):
    with pytest.raises(ValueError, match="not supported"):
        Schedule.from_config({**BETAS, **extra}, name)


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(ValueError, match="not known"):
        Schedule.from_config({}, "OfAnotherLibraryScheduler")
    with pytest.raises(ValueError, match="discrete diffusion without levels of noise"):
        Schedule.from_config({}, "VQDiffusionScheduler")
