"""Requests of pipelines to a drop-in scheduler beside a step: tables, second answers, parts."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UnCLIPScheduler

import sampler
from sampler.core.errors import ModelError
from tests import tiny

FLOW = diffusers.FlowMatchEulerDiscreteScheduler()


def stepped(base=None, steps=4, **more):
    found = sampler.scheduler("ddim", base or DDIMScheduler(**tiny.DDIM))
    found.set_timesteps(steps)
    x = found.scale_model_input(torch.ones(1, 4, 8, 8))
    return found, found.step(x / 2, found.timesteps[0], x, return_dict=False, **more)


def test_the_tables_of_the_noise_are_those_of_the_replaced_scheduler():
    base = DDIMScheduler(**tiny.DDIM)
    found = sampler.scheduler("ab", base)
    assert torch.equal(found.alphas_cumprod, base.alphas_cumprod)
    assert torch.allclose(found.alphas, base.alphas, atol=1e-6)
    assert torch.allclose(found.betas, base.betas, atol=1e-6)


def test_the_configuration_follows_what_is_registered():
    found = sampler.scheduler("ab", DDIMScheduler(**tiny.DDIM))
    assert found.config is found.config and found.config["sampler"]["name"] == "ab"
    found.register_to_config(sampler={"name": "ddim"})
    assert found.config["sampler"]["name"] == "ddim"


def test_what_it_lacks_is_refused_by_name_and_does_not_exist():
    found = sampler.scheduler("ab", DDIMScheduler(**tiny.DDIM))
    assert not hasattr(found, "_get_variance") and not hasattr(
        sampler.scheduler("ab", FLOW), "betas"
    )
    with pytest.raises(ModelError, match="no '_get_variance', which this pipeline computes with"):
        found._get_variance(1, 0)
    assert found.config.beta_end == 0.012


def test_a_second_answer_is_refused():
    _, answer = stepped()
    assert len(answer) == 1 and answer[0].shape == answer[-1].shape == (1, 4, 8, 8)
    (only,) = answer
    assert torch.equal(only, answer[0])
    with pytest.raises(ValueError, match="reads a second answer of its scheduler's step"):
        answer[1]


def test_a_level_in_the_place_of_x_is_refused():
    found = sampler.scheduler("ddim", EulerDiscreteScheduler(**tiny.BETAS))
    found.set_timesteps(4)
    with pytest.raises(ValueError, match="computes with the sigmas of an Euler scheduler"):
        found.scale_model_input(found.sigmas[0], found.timesteps[0])


def test_the_next_timestep_of_unclip_is_checked():
    base = UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)
    times = sampler.scheduler("ddim", base)
    times.set_timesteps(4)
    stepped(base, prev_timestep=times.timesteps[1])
    with pytest.raises(ValueError, match="prev_timestep = 7 is not the next one"):
        stepped(base, prev_timestep=7)


@pytest.mark.parametrize("steps", [2, 3, 25])
def test_the_levels_of_unclip_are_its_own(steps):
    base = UnCLIPScheduler(prediction_type="sample")
    base.set_timesteps(steps)
    found = sampler.scheduler("ddim", base)
    found.set_timesteps(steps)
    assert found.timesteps.tolist() == base.timesteps.tolist()
    assert torch.allclose(found.alphas_cumprod, base.alphas_cumprod, atol=1e-6)


def test_tokens_that_are_conditions_stay():
    """LTXConditionPipeline gives every token its timestep, and the velocity with the other sign."""
    times = torch.tensor([[1000.0, 0.0]])
    x, velocity = torch.ones(1, 2, 3), torch.full((1, 2, 3), 0.5)
    results = []
    for scheduler in (FLOW, sampler.scheduler("ddim", FLOW)):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        assert t == 1000
        given = {"per_token_timesteps": times, "return_dict": False}
        results.append(scheduler.step(-velocity, t, x, **given)[0])
    assert torch.allclose(*results) and torch.equal(results[1][:, 1], x[:, 1])
    assert not torch.allclose(results[1][:, 0], x[:, 0])


@pytest.mark.parametrize(
    "method, shift, times, sentence",
    [
        ("ab", 1.0, [[1000.0, 500.0]], "A condition with a strength below 1 is denoised from"),
        ("ddim", 3.0, [[1000.0, 0.0]], "are levels of a schedule without a shift"),
        ("ddim", 1.0, [[1000.0]], r"per_token_timesteps has shape \(1, 1\), not"),
    ],
)
def test_other_levels_of_tokens_are_refused(method, shift, times, sentence):
    drop = sampler.scheduler(method, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    drop.set_timesteps(timesteps=[1000.0, 700.0, 300.0])
    x = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=sentence):
        for t in drop.timesteps[:2]:
            at = torch.tensor(times).clamp(max=float(t))
            x = drop.step(-x / 2, t, x, per_token_timesteps=at, return_dict=False)[0]
