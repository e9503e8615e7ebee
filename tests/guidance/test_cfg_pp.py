"""`cfg_pp` against ComfyUI's and the authors' code, and as the scale of `cfg` that it equals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

import sampler
from sampler import registry
from sampler.types import Cond, Level
from tests import tiny
from tests.analytic import vp_grid
from tests.guidance.golden import relative
from tests.laws.world import Counting, cond, noise, run

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "guidance_pack" / "cfg_pp.npz")
VP = zip(GOLDEN["vp_alpha"].tolist(), GOLDEN["vp_sigma"].tolist(), strict=True)
GRIDS = {
    "edm": [Level(s, 1.0, s) for s in GOLDEN["edm_sigmas"].tolist()],
    "flow": [Level(s, 1 - s, s) for s in GOLDEN["flow_sigmas"].tolist()],
    "vp": [
        Level(0, *pair)
        for pair in zip(GOLDEN["vp_alpha"].tolist(), GOLDEN["vp_sigma"].tolist(), strict=True)
    ],
}


def walk(levels, method, prediction, dtype=torch.float64):
    """Every x of a run over the golden denoisers."""
    means, stds = torch.as_tensor(GOLDEN["mean"]).to(dtype), GOLDEN["std"].tolist()

    def fn(x, level, which):
        a, s = level.alpha, level.sigma
        outs = []
        for mean, std in zip(means, stds, strict=True):
            x0 = mean + a * std**2 / (a * a * std**2 + s * s) * (x - a * mean)
            eps = (x - a * x0) / s
            outs.append(
                {"x0": x0, "eps": eps, "velocity": eps - x0, "v": a * eps - s * x0}[prediction]
            )
        return torch.where(which.view(-1, 1, 1, 1) > 0.5, *outs)

    x = torch.as_tensor(GOLDEN["x"]).to(dtype) * (8.0 if levels is GRIDS["edm"] else 1.0)
    engine = sampler.Engine(sampler.denoiser(fn, prediction))
    rule = registry.build("guidance", {"name": "cfg_pp", "strength": float(GOLDEN["w"])})
    conditions = Cond(torch.ones(len(x)), torch.zeros(len(x)))
    first, grid = engine.start(x, levels, conditions, method, rule)
    return [x, *(snapshot.x for snapshot in engine.steps(first, grid, conditions, method, rule))]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("name", "grid", "method", "prediction"),
    [
        ("comfy_euler_edm", "edm", "ddim", "x0"),
        ("comfy_euler_flow", "flow", "ddim", "velocity"),
        ("authors_ddim_vp", "vp", "ddim", "eps"),
        ("authors_ddim_vp", "vp", "ddim", "v"),
        ("consistent_2m_edm", "edm", "dpmpp_2m", "x0"),
    ],
)
def test_the_published_steps(name, grid, method, prediction, dtype, bar):
    found = walk(GRIDS[grid], method, prediction, dtype)
    for ours, theirs in zip(found, GOLDEN[name], strict=True):
        assert relative(ours, theirs) <= bar


def test_it_is_cfg_with_a_scale_per_step_for_ddim():
    levels, strength, scales = vp_grid(10), 0.6, []
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        ratio = after.alpha * now.sigma / (now.alpha * after.sigma) if after.sigma else None
        scales.append(strength * ratio / (ratio - 1) if ratio else strength)
    ours = run("ddim", {"name": "cfg_pp", "strength": strength}, levels, noise(2))
    other = run("ddim", {"name": "cfg", "scales": scales}, levels, noise(2))
    assert float((ours - other).norm() / other.norm()) < 1e-12


def test_rows_and_reference_steps():
    counting = Counting()
    engine = sampler.Engine(counting.denoiser)
    engine.run(noise(2), vp_grid(5), cond(2), "ddim", {"name": "cfg_pp", "strength": 0.0})
    assert counting.rows == [2] * 5
    plain = run("ddim", {"name": "cfg_pp", "strength": 0.8}, vp_grid(5), noise(2))
    rule = {"name": "cfg_pp", "strength": 0.4, "reference_steps": 10}
    assert torch.equal(run("ddim", rule, vp_grid(5), noise(2)), plain)
    with pytest.warns(UserWarning, match="above 1"):
        run("ddim", {**rule, "strength": 0.8}, vp_grid(5), noise(2))


@pytest.mark.parametrize("method", ["ab", "ghvb", "nesterov", "dpmpp_2m", "heavy_ball"])
def test_samplers_with_memory_follow_target_and_direction(method):
    ours = run(method, {"name": "cfg_pp"}, vp_grid(12), noise(2))
    cfg = run(method, {"name": "cfg", "scale": 0.6}, vp_grid(12), noise(2))
    assert ours.isfinite().all() and not torch.allclose(ours, cfg)


def test_forecast_keeps_target_and_direction():
    rule = {"name": "forecast", "rule": "cfg_pp", "policy": [1, 1, 1, 1] + [0, 1] * 18}
    plain = run("ddim", "cfg_pp", vp_grid(40), noise(2))
    assert float((run("ddim", rule, vp_grid(40), noise(2)) - plain).norm() / plain.norm()) < 0.02


def test_adaptive_holds_the_direction():
    rule = {"name": "adaptive", "rule": "cfg_pp", "after": "hold", "threshold": 1.0}
    plain = run("ddim", "cfg_pp", vp_grid(8), noise(2))
    assert torch.allclose(run("ddim", rule, vp_grid(8), noise(2)), plain, rtol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused():
    for spec, message in (
        ({"name": "cfg_pp", "strength": 1.5}, "strength = 1.5"),
        ({"name": "adaptive", "rule": "cfg_pp"}, "use after = 'hold'"),
        ({"name": "sum", "rules": ["cfg_pp", "autoguidance"]}, "cfg_pp"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.build("guidance", spec)
    heavy = {"name": "heavy_ball", "base": "unipc"}
    for rule in ("cfg_pp", {"name": "forecast", "rule": "cfg_pp"}):
        for method in ("unipc", "heun", heavy):
            with pytest.raises(ValueError, match="no place for a direction"):
                run(method, rule, vp_grid(8), noise(1))
    pipe, forecast = tiny.sd(), {"name": "forecast", "rule": "cfg_pp"}
    with pytest.raises(ValueError, match="direction apart"), sampler.guide(pipe, forecast):
        pass
    ddim = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(ddim.config)
    with pytest.raises(ValueError, match="direction apart"), sampler.guide(pipe, "cfg_pp"):
        pass
    pipe.scheduler = ddim
    with sampler.guide(pipe, "cfg_pp"), pytest.raises(ValueError, match="eta = 0"):
        pipe("a fox", num_inference_steps=2, eta=0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_a_stock_pipeline_with_a_first_order_scheduler_makes_the_images_of_the_engine(build):
    """DDIM's step and Euler's on a flow; the steps divide the training steps."""
    pipe = build()
    rule = {"name": "cfg_pp", "strength": 0.6}
    given = {"num_inference_steps": 5, "height": 32, "width": 32, "output_type": "latent"}
    prompts = ["a fox", "two green apples"]

    def call():
        draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(prompts, generator=draws, guidance_scale=3.0, **given)[0]

    plain = call()
    with sampler.guide(pipe, rule) as calls:
        stock = call()
    run = {"steps": 5, "height": 32, "width": 32, "output": "latent", "sampler": "ddim"}
    ours = sampler.load(pipe).generate(prompts, seeds=[1, 2], guidance=rule, **run)
    assert torch.allclose(stock, ours.latents, atol=1e-4) and calls.nfe == ours.nfe == [10, 10]
    assert (stock - plain).norm() > 1e-3 * plain.norm()
