"""Momentum samplers: orders, stability, identities, refusals, and diffusers' own solvers."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import sampler
from sampler.samplers.coefficients import adams_bashforth, ghvb
from sampler.samplers.multistep_weights import places, weights
from sampler.types import Level, Prediction, Span
from tests.analytic import flow_grid, mixture, sigma_grid, vp_grid
from tests.samplers.golden import arrays
from tests.samplers.golden import mixture as golden_mixture

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(method, levels, x, eps):
    return sampler.Engine(sampler.denoiser(lambda x, lv, _: eps(x, lv))).run(
        x, levels, sampler=method
    )


def orders(method, levels_of, steps=(40, 80, 160, 320)):
    """Observed orders on the reference ODE, one per doubling."""
    data = arrays("reference_ode")
    mix, x = golden_mixture(data), torch.from_numpy(data["xbar_start"])
    exact = torch.from_numpy(data["xbar"])[-1]
    errors = []
    for n in steps:
        levels = levels_of(n)
        end = run(method, levels, x * levels[0].alpha, mix.eps)
        errors.append(float((end / levels[-1].alpha - exact).norm()))
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def karras_grid(n, high=8.0, low=0.5, rho=7.0):
    a, b = high ** (1 / rho), low ** (1 / rho)
    ratios = [(a + i / n * (b - a)) ** rho for i in range(n + 1)]
    return [Level(r, 1 / math.sqrt(1 + r * r), r / math.sqrt(1 + r * r)) for r in ratios]


@pytest.mark.parametrize("number", [1.0, 2.0, 3.0, 0.5, 1.5, 1.8, 2.5])
def test_ghvb_is_of_the_order_of_its_sum(number):
    observed = orders({"name": "ghvb", "momentum_number": number}, sigma_grid)
    assert observed[-1] >= math.ceil(number) - 0.35


@pytest.mark.parametrize("number", [0.5, 1.8, 3.8])
def test_heavy_ball_is_first_order(number):
    observed = orders({"name": "heavy_ball", "momentum_number": number}, sigma_grid)
    assert 0.85 <= observed[-1] <= 1.2


def test_fourth_order_and_nesterov():
    assert orders({"name": "ab", "order": 4}, sigma_grid)[-1] > 3.5
    assert orders({"name": "nesterov", "momentum_number": 3.8}, sigma_grid)[-1] < 1.3


def test_variable_steps_restore_the_order_on_an_unequal_grid():
    """Fixed coefficients are of order 2 on Karras' grid; variable ones of order 3."""
    fixed = orders({"name": "ab", "order": 3}, karras_grid)
    variable = orders({"name": "ab", "order": 3, "steps": "variable"}, karras_grid)
    assert fixed[-1] < 2.3 and variable[-1] > 2.7


@pytest.mark.parametrize("order", range(1, 6))
def test_variable_coefficients(order):
    """Exact for polynomials of degree order − 1, and Adams-Bashforth's where steps are equal."""
    equal = weights(places([-k for k in range(order)], 1.0), 0.0)
    assert np.allclose(equal, adams_bashforth(order), rtol=1e-9)
    nodes = [0.3, 1.1, 1.5, 2.9, 3.3][:order]
    coefficients, end = weights(places(nodes, 0.1), 0.0), 0.1
    for degree in range(order):
        exact = (end ** (degree + 1) - nodes[0] ** (degree + 1)) / (degree + 1) / (end - nodes[0])
        ours = sum(c * u**degree for c, u in zip(coefficients, nodes, strict=True))
        assert ours == pytest.approx(exact, rel=1e-9)


def after(method, rate, steps=600):
    """|z| after unit steps of z' = −rate·z from 1."""
    method, z, state = sampler.build("sampler", method), torch.ones(1, 1, dtype=torch.float64), ()
    for i in range(steps):
        now, later = Level(0, 1.0, float(i)), Level(0, 1.0, float(i + 1))
        pred = Prediction.from_eps(z, -rate * z, now)
        move = method.step(z, pred, Span(i, now, later), state)
        z, state = sampler.settle((move.mean, move.state))
    return float(z.abs())


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ({"name": "ab", "order": 4}, 3 / 10),
        ({"name": "heavy_ball", "momentum_number": 0.8}, 2 * 1.2 / 0.8),
        ({"name": "heavy_ball", "momentum_number": 2.5}, 6 / 11 * 1.5 / 0.5),
        ({"name": "ghvb", "momentum_number": 1.8}, 2 - 0.8),
        ({"name": "ghvb", "momentum_number": 2.8}, 24 * 1.2 / (48 - 3.2)),
        ({"name": "ghvb", "momentum_number": 3.8}, 48 * 1.2 / (176 - 12.8)),
    ],
    ids=lambda v: str(v["name"]) if isinstance(v, dict) else "",
)
def test_stability_interval(method, limit):
    assert after(method, 0.97 * limit) < 1 and after(method, 1.03 * limit) > 100


@pytest.mark.parametrize("grid", [vp_grid(9), flow_grid(9, 0.95)], ids=["vp", "flow"])
def test_identities(grid):
    mix, x = mixture(8), torch.randn(2, 8, dtype=torch.float64)

    def same(one, other, tolerance=1e-12):
        a, b = run(one, grid, x, mix.eps), run(other, grid, x, mix.eps)
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance)

    for order in range(1, 6):
        plain = {"name": "ab", "order": order}
        for name in ("heavy_ball", "ghvb", "nesterov"):
            assert same({"name": name, "momentum_number": float(order)}, plain)
    assert same("ddim", {"name": "ghvb", "momentum_number": 1.0})
    half = {"momentum_number": 0.6}
    assert same({"name": "ghvb", **half}, {"name": "heavy_ball", **half})
    close_to_one = {"name": "ghvb", "order": 3, "beta": 1 - 1e-7}
    assert same(close_to_one, {"name": "ghvb", "momentum_number": 3}, 1e-5)
    for base in ("dpmpp_2m", "unipc"):
        assert same({"name": "heavy_ball", "base": base, "beta": 1.0}, base)
        assert not same({"name": "heavy_ball", "base": base, "beta": 0.8}, base)
    fixed = {"name": "ab", "order": 2}
    assert not same(fixed, {**fixed, "steps": "variable"}) or grid[0].alpha + grid[0].sigma == 1


def test_two_forms_of_the_momentum_number():
    for number, order, beta in ((3.9, 4, 0.9), (0.8, 1, 0.8), (2, 2, 1.0), (5.0, 5, 1.0)):
        given = sampler.build("sampler", {"name": "ghvb", "momentum_number": number}).momentum
        assert given == (order, beta) and given.number == pytest.approx(number, abs=1e-12)
        both = {"name": "ghvb", "momentum_number": number, "order": order, "beta": beta}
        assert sampler.build("sampler", both).momentum == given
    assert sampler.build("sampler", {"name": "heavy_ball", "beta": 0.5}).momentum == (2, 0.5)
    assert sampler.build("sampler", {"name": "ghvb", "order": 4}).momentum == (4, 0.8)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ({"name": "ghvb", "beta": 0.0}, "beta = 0.0"),
        ({"name": "ghvb", "beta": 1.5}, "beta = 1.5"),
        ({"name": "ghvb", "order": 6}, "order = 6"),
        ({"name": "ab", "order": 6}, "order = 6"),
        ({"name": "heavy_ball", "momentum_number": 5.5}, "momentum_number = 5.5"),
        ({"name": "heavy_ball", "momentum_number": 0.0}, "momentum_number = 0.0"),
        ({"name": "ghvb", "momentum_number": -1.0}, "momentum_number = -1.0"),
        ({"name": "ghvb", "momentum_number": 1.8, "order": 3}, "contradicts"),
        ({"name": "ghvb", "momentum_number": 1.8, "beta": 0.9}, "contradicts"),
        ({"name": "heavy_ball", "base": "unipc", "momentum_number": 3.8}, "order 2"),
        ({"name": "heavy_ball", "base": "dpmpp_2m", "compat": "published"}, "compat"),
        ({"name": "heavy_ball", "base": "heun"}, "base"),
        ({"name": "ghvb", "momentum_number": "best"}, "calibrated:FILE"),
        ({"name": "ddim", "eta": -0.1}, "eta = -0.1"),
        ({"name": "ab", "steps": "some"}, "steps"),
        ({"name": "ghvb", "space": "cold"}, "space"),
    ],
)
def test_bad_numbers_are_refused_when_built(spec, part):
    with pytest.raises(ValueError, match=part):
        sampler.build("sampler", spec)


@pytest.mark.parametrize("name", ["ab", "ghvb", "heavy_ball", "nesterov"])
def test_flow_space_is_refused_on_other_models(name):
    x = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="space = 'flow' needs a flow-matching model"):
        run({"name": name, "space": "flow"}, vp_grid(3), x, mixture(8).eps)
    assert (
        run({"name": name, "space": "flow"}, flow_grid(3, 0.9), x, mixture(8).eps).isfinite().all()
    )


def test_ab_in_data_space_is_of_its_order():
    def equal_in_u(n):
        us = np.linspace(1 / 8, 2, n + 1)
        return [Level(u, u / math.sqrt(1 + u * u), 1 / math.sqrt(1 + u * u)) for u in us]

    assert orders({"name": "ab", "order": 2, "space": "data"}, equal_in_u)[-1] > 1.8


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("name", "stock"),
    [("dpmpp_2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)],
)
def test_equal_to_diffusers(name, stock, final, steps):
    mix = mixture(8)
    scheduler = stock(**BETAS, final_sigmas_type=final, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    levels = sampler.Schedule.from_config(scheduler.config, stock.__name__).grid(steps)
    x = torch.randn(2, 8, dtype=torch.float64)
    ours, theirs = run(name, levels, x, mix.eps), x
    for level, t in zip(levels[:-1], scheduler.timesteps, strict=True):
        assert int(t) == level.t
        theirs = scheduler.step(mix.eps(theirs, level), t, theirs).prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_start_without_signal_of_a_second_order_history():
    """h is infinite in the first step of a zero-terminal-SNR grid: no NaN, first-order history."""
    levels = (Level(999, 0.0, 1.0), *vp_grid(6))
    mix, x = mixture(8), torch.randn(2, 8, dtype=torch.float64)

    def v(x, level, _):
        return -mix.mu.mean(0).expand_as(x) if level.alpha == 0 else mix.out(x, level, "v")

    ends = {}
    for name in ("ddim", "dpmpp_2m", "unipc", "ab", "ghvb", "heun"):
        ends[name] = sampler.Engine(sampler.denoiser(v, "v")).run(x, levels, sampler=name)
        assert ends[name].isfinite().all()
    variable = {"name": "ab", "order": 3, "steps": "variable"}
    end = sampler.Engine(sampler.denoiser(v, "v")).run(x, levels, sampler=variable)
    assert end.isfinite().all() and not torch.equal(end, ends["ddim"])


def test_state_is_small_and_float32_for_a_half_network():
    levels, x = vp_grid(8), torch.randn(2, 4, 4, 4)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: torch.tanh(x).half()))
    from sampler_kernels import leaves

    method = {"name": "ghvb", "momentum_number": 3.8}
    first, grid = engine.start(x, levels, sampler=method)
    for snap in engine.steps(first, grid, sampler=method):
        tensors = [t for t in leaves(snap.sampler) if isinstance(t, torch.Tensor)]
        assert len(tensors) <= 4 and all(t.dtype == torch.float32 for t in [snap.x, *tensors])
    assert sum(ghvb(4, 0.8)) == pytest.approx(1)
