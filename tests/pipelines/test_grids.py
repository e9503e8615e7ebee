"""Named grids against those of ComfyUI and diffusers, and the promise of n different levels."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import beta

import sampler
from sampler.core import named_grids, ramps, spacings
from sampler.core.ramps import beta_quantiles
from sampler.core.spacings import NAMES
from tests import tiny
from tests import tiny_transformers as transformers
from tests.samplers.test_golden_solvers import FOLDER

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DYNAMIC = {"use_dynamic_shifting": True, "num_train_timesteps": 10_000}
EVERYWHERE = [name for name in NAMES if not name.startswith("ays")]


def schedule(table, name="", scheduler="DDIMScheduler"):
    if table.startswith("flow"):
        config = {"shift": float(table.removeprefix("flow"))}
    elif table.startswith("flux"):
        config = DYNAMIC
    else:
        config = {**BETAS, "timestep_spacing": "linspace"}
    if name.startswith("diffusers:"):
        config = {**config, name.removeprefix("diffusers:"): True}
    if table.startswith("fl"):
        scheduler = "FlowMatchEulerDiscreteScheduler"
    return sampler.Schedule.from_config(config, scheduler)


def noise(level, flow):
    return level.sigma if flow else level.sigma / level.alpha


def cases():
    with np.load(FOLDER / "grids.npz") as arrays:
        for case in json.loads((FOLDER / "grids.json").read_text())["cases"]:
            if case["numbers"] != case["steps"] + 1:
                continue  # one step more or less than asked for
            if case["name"] == "ddim_uniform" and case["steps"] == 1:
                continue  # the least noisy level; ours is the noisiest
            times = arrays.get(f"{case['key']}_timesteps")
            label = f"{case['key']}-{case['table']}-{case['name']}-{case['steps']}"
            yield pytest.param(case, arrays[case["key"]], times, id=label)


@pytest.mark.parametrize(("case", "right", "times"), cases())
def test_named_grids_are_the_published_ones(case, right, times):
    table, name, steps = case["table"], case["name"], case["steps"]
    flow, spacing = table.startswith("fl"), name
    if name == "ays":
        spacing = {"SD1": "ays_sd15", "SDXL": "ays_sdxl", "SVD": "ays_svd"}[table]
    if name == "polyexponential":  # between ends of its own
        options = spacings.options_of(name, {"rho": case["rho"]})
        found = [*ramps.polyexponential(right[-2], right[0], steps, options), 0.0]
    elif table == "SVD":
        axis = named_grids.TrainingLevels([0.002, 700.0], lambda t: t, 1, 0, "v")
        found = [p.noise for p in named_grids.places(spacing, axis, steps, {})] + [0.0]
    else:
        known = schedule(table, name, case.get("scheduler", "DDIMScheduler"))
        mu = None if known.dynamic is None else 1.15
        spacing = None if name.startswith("diffusers") else spacing
        grid = known.grid(steps, spacing=spacing, mu=mu)
        found = [noise(level, flow) for level in grid]
        told = [level.t for level in grid[:-1]]
        if times is not None and case.get("unique", steps) == steps:
            # DPM-Solver rounds down where it says nothing of rounding
            whole = case["scheduler"].startswith("DPM") and "karras" not in name
            assert np.allclose(told, times, rtol=3e-4, atol=1.0 if whole else 2e-3)
    assert len(found) == steps + 1
    assert np.allclose(found, right, rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("table", ["sd", "flow1", "flow3"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_exactly_n_different_levels(name, table):
    known = schedule(table)
    for n in (1, 2, 3, 10, 19, 20, 139, 150, 200, 300, 501, 777, 999, 1000):
        grid = known.grid(n, spacing=name)
        assert len(grid) == n + 1 and grid[-1].sigma == 0
        ratios = [v.sigma / v.alpha if v.alpha else math.inf for v in grid]
        assert all(after < before for before, after in pairwise(ratios)), n
        assert len({level.t for level in grid[:-1]}) == n
        assert (
            n > 1
            or ratios[0] == pytest.approx(known.grid(1, "karras")[0].sigma, rel=1e-3)
            or (ratios[0] > 14)
        )


def test_a_rounding_scheduler_tells_distinct_times():
    known = schedule("sd", "diffusers:use_exponential_sigmas", "DPMSolverMultistepScheduler")
    assert [t == int(t) for t, *_ in known.grid(8)[:-1]] == [True] * 8
    assert len({level.t for level in known.grid(20)[:-1]}) == 20  # stock repeats a time here


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.7), (1.0, 1.0), (2.0, 5.0)])
def test_quantiles_of_the_beta_distribution(a, b):
    at = [0, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1]
    assert np.allclose(beta_quantiles(at, a, b), beta.ppf(at, a, b), rtol=1e-9, atol=1e-14)


def test_settings_of_a_name():
    known = schedule("sd")
    karras, wide = (known.grid(8, spacing={"name": "karras", "rho": r}) for r in (7.0, 3.0))
    assert [v[1:] for v in karras] == [v[1:] for v in known.grid(8, spacing="karras")]
    assert wide[3] != karras[3] and wide[0] == karras[0]
    poly = known.grid(8, spacing={"name": "polyexponential", "rho": 1})
    assert poly == known.grid(8, spacing="exponential")
    assert known.grid(9, {"name": "beta", "alpha": 0.5, "beta": 0.7}) != known.grid(9, "beta")


def test_lists_of_levels():
    known, flow = schedule("sd"), schedule("flow3")
    by_noise = known.grid(3, spacing=[14.0, 3.0, 0.5, 0])
    assert [v.sigma / v.alpha for v in by_noise[:-1]] == pytest.approx([14.0, 3.0, 0.5])
    assert all(0 < v.t < 999 for v in by_noise[:-1]) and by_noise[-1].sigma == 0
    by_time = known.grid(3, spacing=[999, 500, 20])
    assert by_time == known.grid(3, spacing={"timesteps": [999, 500, 20]})
    assert by_time[:-1] == tuple(known.level(t) for t in (999, 500, 20))
    assert [v.sigma for v in flow.grid(2, spacing=[0.9, 0.4])[:-1]] == [0.9, 0.4]
    times = flow.grid(2, spacing={"times": [1.0, 0.5]})[:-1]
    assert [v.sigma for v in times] == pytest.approx([1.0, 3 * 0.5 / (1 + 2 * 0.5)])
    assert [v.t for v in times] == pytest.approx([1000.0, 750.0])


@pytest.mark.parametrize(("spec", "message"), [
    ("carras", r"'carras' is not known \(did you mean 'karras'\?\)"),
    ({"name": "karras", "alpha": 1}, "'karras' has no setting 'alpha'; it has rho"),
    ({"name": "simple", "rho": 1}, "'simple' has no setting 'rho'; it has no settings"),
    ({"name": "beta", "alpha": 0}, "alpha = 0 of 'beta' must be a number above 0"),
    ([5.0, 5.0, 1.0], "5 after 5: the levels of a list must fall"),
    ([5.0, "x", 1.0], "'x' must be a number of at least 0"),
    ([0], "a list needs at least one level above 0"),
    ([5.0, 1.0], "2 levels are 2 steps, not 3"),
    ({"times": [0.9, 0.5, 0.1]}, "'times' are flow times before the shift"),
    ({"timesteps": [1000, 500, 20]}, "1000 must be at most 999 here"),
    ("ays_svd", "is for another model: for v-predictions on levels from 700 to 0.002"),
    (3.5, "3.5 must be a name, a mapping with 'name', or numbers"),
])  # fmt: skip
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        schedule("sd").grid(3, spacing=spec)
    assert str(error.value).startswith("grid") and str(error.value).endswith(".")


def test_grids_of_other_models_are_refused():
    cosine = {**BETAS, "beta_schedule": "squaredcos_cap_v2"}
    other = sampler.Schedule.from_config(cosine, "DDIMScheduler")
    with pytest.raises(ValueError, match="'ays_sd15' is for another model"):
        other.grid(10, spacing="ays_sd15")
    with pytest.raises(ValueError, match="'ays_sdxl' is for another model"):
        schedule("flow3").grid(10, spacing="ays_sdxl")
    with pytest.raises(ValueError, match="sigma = 2 of a flow model must be at most 1"):
        schedule("flow3").grid(2, spacing=[2.0, 1.0])


def test_a_terminal_of_the_schedule_stays_last():
    config = {"shift": 3.0, "shift_terminal": 0.02}
    known = sampler.Schedule.from_config(config, "FlowMatchEulerDiscreteScheduler")
    for name in ("beta", "karras", "simple"):
        assert known.grid(8, spacing=name)[-2].sigma == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EDMEulerScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("SCMScheduler", {}),
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_of_training_timesteps_need_some(name, config, spacing):
    known = sampler.Schedule.from_config(config, name)
    with pytest.raises(ValueError, match=f"'{spacing}' counts the training timesteps"):
        known.grid(4, spacing=spacing)


def test_a_spacing_and_sigmas_are_refused():
    known = sampler.Schedule.from_config({}, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="either a spacing or sigmas"):
        known.grid(2, spacing="karras", sigmas=[1.0, 0.5])


def test_edm_schedules_have_named_grids():
    known = sampler.Schedule.from_config({}, "EDMEulerScheduler")
    for name in EVERYWHERE:
        grid = known.grid(9, spacing=name)
        assert len(grid) == 10 and grid[0].sigma == pytest.approx(80.0, rel=0.5)
        assert all(v.t == pytest.approx(math.log(v.sigma) / 4) for v in grid[:-1])
    assert known.grid(9, "karras") == known.grid(9)


# where a grid is chosen


def engine_latents(pipe, **options):
    call = {"seeds": 1, "steps": 4, "output": "latent", "guidance": "none"}
    return sampler.load(pipe).generate("a fox", **{**call, **options})


def test_generate_takes_a_grid_and_records_it():
    pipe = tiny.sd("v")
    plain, beta_ = engine_latents(pipe), engine_latents(pipe, grid="beta")
    assert "grid" not in plain.config and beta_.config["grid"] == "beta"
    assert not torch.equal(plain.latents, beta_.latents)
    again = sampler.load(pipe).generate(**beta_.config)
    assert torch.equal(again.latents, beta_.latents)
    listed = engine_latents(pipe, grid={"timesteps": [900, 500, 100]})
    assert listed.config["steps"] == 3 == listed.nfe[0]
    text = engine_latents(pipe, grid="900, 500, 100")
    assert torch.equal(text.latents, listed.latents)
    with pytest.raises(ValueError, match="'bete' is not known"):
        engine_latents(pipe, grid="bete")


PIPES = [tiny.sd, tiny.sdxl, tiny.sd3, tiny.flux, transformers.qwen_image, transformers.z_image]


@pytest.mark.parametrize("build", PIPES)
@pytest.mark.parametrize("grid", ["beta", "karras", {"sigmas": [0.9, 0.6, 0.4, 0.1]}], ids=str)
def test_stock_pipelines_walk_the_grid_of_the_engine(build, grid):
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32}
    right = sampler.load(pipe).with_grid(grid).pipeline.grid(4, (32, 32))
    pipe.scheduler = sampler.scheduler("res_multistep", pipe.scheduler, grid=grid)
    out = pipe("a fox", num_inference_steps=4, output_type="latent", **size)
    latents = out.images if isinstance(out.images, torch.Tensor) else torch.stack(out.images)
    assert latents.isfinite().all()
    flow = pipe.scheduler.schedule.process == "flow"
    found = pipe.scheduler.sigmas.tolist()
    assert found == pytest.approx([noise(level, flow) for level in right], rel=1e-6)


def test_a_drop_in_with_a_grid_is_the_engine_bit_for_bit():
    pipe = tiny.sd("v")
    ours = engine_latents(pipe, grid="beta", sampler="dpmpp_2m").latents
    pipe.scheduler = sampler.scheduler("dpmpp_2m", pipe.scheduler, grid="beta")
    call = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(pipe("a fox", generator=generator, **call).images, ours)
    with pytest.raises(ValueError, match="was made with a grid: leave out timesteps"):
        pipe("a fox", timesteps=[900, 500, 100, 1], **call)
    again = sampler.scheduler("ddim", pipe.scheduler)
    assert again.config["grid"] == "beta"


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_table_without_signal_at_its_end(name):
    """Zero terminal SNR: time-based grids start at alpha = 0, ramps at the last level above it."""
    config = {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    known = sampler.Schedule.from_config(config, "DDIMScheduler")
    for n in (1, 2, 20, 999, 1000):
        grid = known.grid(n, spacing=name)
        ratios = [v.sigma / v.alpha if v.alpha else math.inf for v in grid]
        assert len(grid) == n + 1 and all(b < a for a, b in pairwise(ratios)), n
        assert len({level.t for level in grid[:-1]}) == n
        assert all(0 <= level.t <= 999 for level in grid)


def test_a_run_does_not_start_at_a_middle_level():
    """From alpha = 0 the first step has no middle level, so that pipelines' cuts fall into one."""
    drop = sampler.scheduler("res_2s", tiny.sd3().scheduler, grid="simple")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for begin, fits in ((2, False), (1, True)):
        drop.set_timesteps(4)
        assert len(drop.timesteps) == 6 and drop.order == 2
        drop.set_begin_index(begin)
        noised = drop.scale_noise(x, drop.timesteps[begin : begin + 1], x.flip(-1))
        if fits:
            drop.step(x, drop.timesteps[begin], noised)
            continue
        with pytest.raises(ValueError, match="the cut falls between the two evaluations"):
            drop.step(x, drop.timesteps[begin], noised)
