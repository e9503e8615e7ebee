"""HB, GHVB, Nesterov, DPM-Solver++ and UniPC with momentum against the authors' published code."""

import json

import numpy as np
import pytest
import torch
from sampler_kernels import use_backend

import sampler
from sampler.samplers.coefficients import ghvb
from sampler.types import Level, Prediction, Span
from tests.samplers.golden import FOLDER, arrays, case_levels, cases, mixture, spec, trajectory

DTYPES = ((torch.float64, 1e-9), (torch.float32, 1e-4))
PLMS = [c | {"file": "momentum_plms"} for c in cases("momentum_plms")]
TOY = json.loads((FOLDER / "coefficients_toy.json").read_text())
SOLVERS = [c | {"file": "momentum_solvers", "base": "dpm"} for c in cases("momentum_solvers")]


def close(ours, golden, tolerance):
    """rtol = atol = tolerance, over the whole trajectory."""
    worst = ((ours - golden).abs() / (1 + golden.abs())).max()
    assert worst <= tolerance, f"{worst:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("case", PLMS + SOLVERS, ids=lambda c: f"{c['file']}-{c['key']}")
def test_trajectory(case, dtype, tolerance):
    data = arrays(case["file"])
    mix, key = mixture(data), case["key"]
    levels = case_levels(data, key, case["base"])
    x = torch.from_numpy(data["x_T"]).to(dtype)
    walked = trajectory(spec(case), lambda x, lv: mix.eps(x.double(), lv).to(dtype), x, levels)
    units = [1 / lv.alpha if case["base"] == "euler" else 1.0 for lv in levels]
    ours = torch.stack([w.double() * u for w, u in zip(walked, units, strict=True)])
    close(ours, torch.from_numpy(data[f"{key}_traj"]), tolerance)


@pytest.mark.parametrize("case", PLMS + SOLVERS, ids=lambda c: f"{c['file']}-{c['key']}")
def test_trajectory_with_fused_kernels(case):
    """The same by Triton's kernels (in its interpreter where there is no GPU), float32."""
    data = arrays(case["file"])
    levels = case_levels(data, case["key"], case["base"])
    x, mix = torch.from_numpy(data["x_T"]).float(), mixture(data)

    def eps(x, level):
        return mix.eps(x.double(), level).float()

    plain = torch.stack(trajectory(spec(case), eps, x, levels))
    with use_backend("triton"):
        fused = torch.stack(trajectory(spec(case), eps, x, levels))
    close(fused.double(), plain.double(), 1e-6)
    if case["base"] != "euler":
        close(fused.double(), torch.from_numpy(data[f"{case['key']}_traj"]), 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("case", cases("momentum_cfg"), ids=lambda c: c["key"])
def test_trajectory_under_guidance(case, dtype, tolerance):
    """Guidance first, then momentum on the guided slope."""
    data = arrays("momentum_cfg")
    parts = mixture(data), mixture(data, "gmmc")

    def fn(x, level, cond):
        free, bound = (p.eps(x.double(), level).to(dtype) for p in parts)
        return torch.where(cond.view(-1, 1, 1, 1) > 0, bound, free)

    levels = case_levels(data, case["key"], case.get("base", "dpm"))
    x = torch.from_numpy(data["x_T"]).to(dtype)
    cond = sampler.Cond(cond=torch.ones(len(x)), uncond=torch.zeros(len(x)))
    rule = {"name": "cfg", "scale": case["guidance_scale"]}
    engine = sampler.Engine(sampler.denoiser(fn), sampler=spec(case), guidance=rule)
    first, grid = engine.start(x, levels, cond)
    walked = [first.x, *(s.x for s in engine.steps(first, grid, cond))]
    golden = torch.from_numpy(data[f"{case['key']}_traj"])
    close(torch.stack(walked).double(), golden, tolerance)


@pytest.mark.parametrize("beta", TOY["betas"])
@pytest.mark.parametrize("order", range(1, 6))
def test_coefficients(order, beta):
    golden = arrays("coefficients_toy")[f"coef_r{order}_b{beta:g}"]
    assert np.allclose(ghvb(order, beta), golden, rtol=1e-12, atol=1e-12)
    assert sum(ghvb(order, beta)) == pytest.approx(1, abs=1e-11)


def toy_walk(method, matrix, x, steps, end):
    """dx/du = A x from u = 0 to `end`: levels with alpha = 1 make z = x, and u = sigma."""
    method, state, walked = sampler.build("sampler", method), (), [x]
    for i in range(steps):
        now, after = (Level(0, 1.0, k * end / steps) for k in (i, i + 1))
        pred = Prediction.from_eps(x, x @ matrix.T, now)
        move = method.step(x, pred, Span(i, now, after), state)
        x, state = sampler.settle((move.mean, move.state))
        walked.append(x)
    return torch.stack(walked)[:, 0]


@pytest.mark.parametrize("case", TOY["toy"], ids=lambda c: f"{c['sampler']}-{c['momentum_number']}")
def test_toy_ode(case):
    """The paper's Appendix C: AB2 diverges where heavy ball does not."""
    data = arrays("coefficients_toy")
    matrix, x = torch.from_numpy(data["toy_A"]), torch.from_numpy(data["toy_x0"])[None]
    walked = toy_walk(spec(case), matrix, x, case["steps"], 3.0)
    golden = torch.from_numpy(data[case["key"]])
    assert torch.allclose(walked, golden, rtol=1e-9, atol=1e-9 * float(golden.abs().max()))
    error = float((walked[-1] - torch.from_numpy(data["toy_exact"])[-1]).norm())
    if case["momentum_number"] in (1.8, 1.9) and case["sampler"] in ("hb", "ghvb"):
        assert error < 0.05
    if case["momentum_number"] == 2.0:
        assert error > 1
