"""The stochastic flow steps against the published code, and what noise they leave."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import sampler
from sampler.types import Level, Prediction, Span, settle

FILE = Path(__file__).parents[1] / "golden" / "flow_training" / "flow_step.npz"


def cases():
    with np.load(FILE) as arrays:
        for k, about in enumerate(json.loads(str(arrays["cases_json"]))):
            prefix = f"c{k:03d}_"
            found = {n[5:]: torch.from_numpy(arrays[n]) for n in arrays if n.startswith(prefix)}
            yield pytest.param(about, found, id=f"{about['kind']}-{k}")


def level(sigma):
    sigma = float(sigma) if sigma.ndim == 0 else sigma
    return Level(sigma, 1 - sigma, sigma)


@pytest.mark.parametrize(("about", "a"), cases())
def test_mean_deviation_and_density_are_those_of_the_published_code(about, a):
    method = sampler.build("sampler", {"name": about["kind"], "noise_level": about["noise_level"]})
    now, after = level(a["sigma"]), level(a["sigma_next"])
    pred = Prediction.from_velocity(a["x"], a["v"], now)
    move = method.step(a["x"], pred, Span(about.get("index", 0), now, after), ())
    mean = settle(move.mean)
    std = torch.ones(len(mean), dtype=torch.float64) * move.std
    assert (mean - a["mean"]).abs().max() <= 1e-9 * a["mean"].abs().max()
    assert (std - a["std"]).abs().max() <= 1e-9 * max(1e-9, float(a["std"].abs().max()))
    if about["kind"] != "cps" and float(std.min()) > 0:
        density = move.log_prob(a["after"]) / a["x"][0].numel()
        assert (density - a["log_prob"]).abs().max() <= 1e-9 * a["log_prob"].abs().max()


def flow(steps):
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return [Level(t, 1 - t, t) for t in times]


def variance(name, steps=10, **fields):
    """Of the last x, where the network knows that x0 = 0: all that is left is noise."""
    model = sampler.denoiser(lambda x, level, cond: x / level.sigma, prediction="velocity")
    x = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = {"name": name, "noise_level": 0.7, **fields}
    return float(
        sampler.Engine(model).run(x, flow(steps), sampler=spec, guidance="none", seeds=[1]).var()
    )


@pytest.mark.parametrize(("name", "fields"), [
    ("cps", {}),
    ("flow_sde", {"coefficient": "exact"}),
    ("dance_sde", {"coefficient": "exact"}),
])  # fmt: skip
def test_exact_coefficients_leave_no_noise(name, fields):
    assert variance(name, **fields) < 1e-20


@pytest.mark.parametrize(("steps", "left"), [(10, 0.079), (20, 0.038), (40, 0.019)])
def test_the_published_coefficients_leave_noise(steps, left):
    assert variance("flow_sde", steps) ** 0.5 == pytest.approx(left, rel=0.35)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_the_excess_variance_is_the_documented_one(name):
    """c² + s² − sigma'² = s²·(sigma − sigma')/sigma + s⁴/(4·sigma²)."""
    method = sampler.build("sampler", {"name": name, "noise_level": 0.9})
    for now, after in ((0.8, 0.6), (0.5, 0.45), (0.2, 0.0)):
        span = Span(1, Level(now, 1 - now, now), Level(after, 1 - after, after))
        s = method.deviation(span)
        excess = method.direction(span, s) ** 2 + s**2 - after**2
        assert excess == pytest.approx(s**2 * (now - after) / now + s**4 / (4 * now**2), rel=1e-9)


def test_exact_coefficients_say_where_they_cannot_draw_the_noise():
    """Once for a run, in a step before the last, which draws none anyway."""
    with pytest.warns(UserWarning, match="exact', 1 of 10 steps draw less noise than") as said:
        variance("flow_sde", coefficient="exact")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fields in ({}, {"coefficient": "exact", "noisy": (0, 8)}):
            variance("flow_sde", **fields)
        variance("cps", noise_level=1.0)


def test_cps_without_noise_is_ddim_on_any_process():
    torch.manual_seed(6)
    x, e = torch.randn(2, 3, 4, 8)
    span = Span(0, Level(700, 0.6, 0.8), Level(300, 0.8, 0.6))
    pred = Prediction.from_eps(x, e, span.now)
    ddim, quiet, outside, small = (
        sampler.build("sampler", spec).step(x, pred, span, ())
        for spec in (
            "ddim",
            {"name": "cps", "noise_level": 0.0},
            {"name": "cps", "noisy": [1, 3]},
            {"name": "cps", "noise_level": 1e-9},
        )
    )
    plain = settle(ddim.mean)
    for move in (quiet, outside):
        assert move.std == 0.0 and torch.equal(settle(move.mean), plain)
    torch.testing.assert_close(settle(small.mean), plain)
    assert 0 < small.std < 1e-8


@pytest.mark.parametrize("name", ["cps", "flow_sde", "dance_sde"])
def test_steps_without_noise_are_ddim_bit_for_bit(name):
    torch.manual_seed(3)
    x, v = torch.randn(2, 3, 4, 8)
    ddim = sampler.build("sampler", "ddim")
    quiet = sampler.build("sampler", {"name": name, "noise_level": 0.0})
    window = sampler.build("sampler", {"name": name, "noisy": [2, 4]})
    grid = flow(8)
    for k in range(7):
        span = Span(k, grid[k + 1], grid[k + 2] if k < 6 else grid[-1])
        pred = Prediction.from_velocity(x, v, span.now)
        plain = settle(ddim.step(x, pred, span, ()).mean)
        assert torch.equal(settle(quiet.step(x, pred, span, ()).mean), plain)
        move = window.step(x, pred, span, ())
        assert (move.std != 0.0) == (2 <= k < 4)
        if move.std == 0.0:
            assert torch.equal(settle(move.mean), plain)


def test_cps_at_one_is_consistency_sampling_on_any_process():
    torch.manual_seed(4)
    x, e = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    span = Span(0, Level(700, 0.6, 0.8), Level(300, 0.8, 0.6))
    pred = Prediction.from_eps(x, e, span.now)
    moves = [
        sampler.build("sampler", spec).step(x, pred, span, ())
        for spec in ({"name": "cps", "noise_level": 1.0}, "consistency")
    ]
    assert torch.allclose(settle(moves[0].mean), settle(moves[1].mean), atol=1e-12)
    assert moves[0].std == pytest.approx(moves[1].std)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_the_sdes_are_refused_on_other_processes(name):
    engine = sampler.load()
    with pytest.raises(ValueError, match=f"{name} needs a flow-matching model.*use cps or ddim"):
        engine.generate("a fox", steps=2, sampler=name)
    with pytest.raises(ValueError, match="noisy = .3, 3. must be"):
        sampler.build("sampler", {"name": name, "noisy": [3, 3]})
