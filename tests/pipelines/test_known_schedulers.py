"""Scheduler classes of diffusers: the stock levels, or a refusal."""

import importlib
import inspect
import json
import sys
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import schedulers

import sampler
from sampler import Schedule
from sampler.core.schedulers import SCHEDULERS, WITHOUT_LEVELS
from sampler.core.stock_schedule import schedule_of
from tests.tiny import BETAS

COSINE = "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep"
CLASSES = sorted(name for name in dir(schedulers) if name.endswith("Scheduler"))
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
OPTIONS = {
    "default": {},
    "trailing": {**BETAS, "timestep_spacing": "trailing"},
    "leading": {**BETAS, "timestep_spacing": "leading", "steps_offset": 1},
    "karras": {**BETAS, "use_karras_sigmas": True},
    "sigma_min": {**BETAS, "final_sigmas_type": "sigma_min"},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": FLOW,
    "flow_sigma_min": {**FLOW, "final_sigmas_type": "sigma_min"},
    "shift": {"shift": 3.0},
    "exponential": {"sigma_schedule": "exponential"},
    "sigma_schedule": {"sigma_schedule": "karras", "final_sigmas_type": "sigma_min"},
}
# What a scheduler needs for a run that goes down one level a step.
PLAIN = {"HeliosScheduler": {"stages": 1}}
GIVEN = {
    "RePaintScheduler": {"jump_length": 1, "jump_n_sample": 1},
    "SCMScheduler": {"intermediate_timesteps": None},
}
CASES = [(name, options) for name in SCHEDULERS for options in OPTIONS]


def stock_class(name):
    """The class; that of Stable Audio without the noise of torchsde, which its levels leave out."""
    if not name.startswith("Cosine"):
        return getattr(schedulers, name)
    with patch.dict(sys.modules, {"torchsde": ModuleType("torchsde")}):
        return getattr(importlib.import_module(COSINE), name)


def built(name, options):
    cls = stock_class(name)
    known = inspect.signature(cls.__init__).parameters
    if any(option not in known for option in options):
        pytest.skip("not an option of this scheduler")
    return cls(**PLAIN.get(name, {}), **options)


def distinct(values):
    """Without repetitions: Heun schedulers list a level twice."""
    return [v for i, v in enumerate(values) if i == 0 or v != values[i - 1]]


@pytest.mark.parametrize("name, options", CASES)
def test_levels_are_the_stock_ones(name, options):
    stock = built(name, OPTIONS[options])
    if name == "HeliosScheduler" and options == "shift":
        pytest.skip("its pipeline shifts by mu, and gives its sigmas")
    schedule = schedule_of(json.loads(json.dumps(dict(stock.config))), name)
    flow, midpoints = schedule.process == "flow", name.startswith(("KDPM2", "PNDM"))
    for steps in (4, 7, 20):
        stock.set_timesteps(steps, **GIVEN.get(name, {}))
        grid = schedule.grid(steps)
        times, theirs = [level.t for level in grid[:-1]], stock.timesteps.tolist()
        theirs = theirs[: len(times)] if schedule.closed else theirs
        if midpoints:  # of their own, between the levels
            assert all(min(abs(t - other) for other in theirs) < 1 for t in times)
            continue
        # other flow schedulers round times down, which networks do not need
        np.testing.assert_allclose(times, distinct(theirs), 0, 1.001 if flow else 1e-2)
        if hasattr(stock, "sigmas") and schedule.process != "consistency":
            ours = [v.sigma if flow else v.sigma / v.alpha for v in grid if v.alpha]
            theirs = stock.sigmas.tolist()
            theirs = theirs if len(theirs) == len(grid) else distinct(theirs)
            np.testing.assert_allclose(ours, theirs[-len(ours) :], 2e-4, 1e-6)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {*SCHEDULERS, *WITHOUT_LEVELS}))
def test_other_schedulers_are_refused(name):
    with pytest.raises(ValueError, match=f"levels of {name} are not known; use one of DDIM"):
        Schedule.from_config({**BETAS, "prediction_type": "epsilon"}, name)


@pytest.mark.parametrize("ramp", ["karras", "exponential"])
def test_stable_audio_is_told_the_share_of_a_quarter_turn(ramp):
    stock = stock_class("CosineDPMSolverMultistepScheduler")(sigma_schedule=ramp)
    schedule = Schedule.from_config({"sigma_schedule": ramp}, type(stock).__name__)
    assert schedule == Schedule.from_config(dict(stock.config), type(stock).__name__)
    for steps in (2, 3, 30):
        stock.set_timesteps(steps)
        grid = schedule.grid(steps)
        np.testing.assert_allclose([v.t for v in grid[:-1]], stock.timesteps, 1e-5)
        np.testing.assert_allclose([v.sigma for v in grid], stock.sigmas, 1e-5)
        assert all(schedule.level(v.t) == pytest.approx(v) for v in grid[:-1])
    assert schedule.initial_scale(grid) == pytest.approx(stock.init_noise_sigma)
    x, out = torch.ones(1, 4), torch.full((1, 4), 0.3)
    sigma = torch.tensor(grid[1].sigma)
    wanted = stock.precondition_outputs(x, out, sigma)
    torch.testing.assert_close(schedule.predict(x, out, grid[1]).x0.tensor(), wanted)
    scaled = x * schedule.network_input(grid[1])
    torch.testing.assert_close(scaled, stock.precondition_inputs(x, sigma))


def test_unknown_classes_are_refused_by_name():
    class MyDDIMScheduler(schedulers.DDIMScheduler):
        pass

    with pytest.raises(ValueError, match="levels of MyDDIMScheduler are not known; use one of"):
        sampler.scheduler("ddim", MyDDIMScheduler())


def test_noise_of_a_shifted_snr_is_the_stock_noise():
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for cls in (schedulers.CogVideoXDDIMScheduler, schedulers.CogVideoXDPMScheduler):
        for options in ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
            stock = cls(snr_shift_scale=3.0, **options)
            drop = sampler.scheduler("ddim", stock)
            for scheduler in (stock, drop):
                scheduler.set_timesteps(4)
            for t in stock.timesteps:
                noises = [s.add_noise(zero, one, t[None]) for s in (stock, drop)]
                assert torch.allclose(*noises, atol=1e-6)


@pytest.mark.parametrize("setting", ["thresholding", "stochastic_sampling"])
def test_settings_without_effect_are_noted(setting):
    if setting == "thresholding":
        stock = schedulers.DDIMScheduler(thresholding=True)
    else:
        stock = schedulers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.warns(UserWarning, match=f"{setting} = True has no effect"):
        sampler.scheduler("ddim", stock)


def test_flow_settings_that_contradict_each_other_are_refused():
    stock = schedulers.UniPCMultistepScheduler(use_flow_sigmas=True)
    with pytest.raises(ValueError, match="go together"):
        sampler.scheduler("ddim", stock)
