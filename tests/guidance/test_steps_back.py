"""Pipelines that ask a step for the x0 of every branch and take it back, as Cosmos does."""

import pytest
import torch
from diffusers import EDMEulerScheduler

import sampler
from sampler.core.errors import ModelError
from tests import tiny
from tests.classic.stand_ins import stand_ins
from tests.classic.table import TINY
from tests.guidance.test_preconditioned import S, cfg, twice

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ["ab", "ghvb", "unipc", "heun", "euler_ancestral"]
COSMOS = ["CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"]


def once(p, u, c, x, t):
    """The same guidance of the network's output itself, in one step."""
    return p.scheduler.step(cfg(u, c), t, x, return_dict=False)[0]


def both(method):
    """Latents of a pipeline that steps twice, and of one that steps once, with a drop-in."""
    base = EDMEulerScheduler(final_sigmas_type="sigma_min")
    found = []
    for single in (False, True):
        pipe = twice(lambda p, u, c, x, i: cfg(u, c))
        pipe.scheduler = sampler.scheduler(method, base)
        if single:
            pipe.stepped = lambda x, t, u, c, i, p=pipe: once(p, u, c, x, t)
        found.append(pipe())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_taken_back_leaves_no_trace(method):
    twice_stepped, wanted = both(method)
    assert wanted.isfinite().all()
    assert (twice_stepped - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_stock_steps_are_those_of_ddim():
    pipe = twice(lambda p, u, c, x, i: cfg(u, c))
    plain = pipe()
    pipe.scheduler = sampler.scheduler("ddim", pipe.scheduler)
    assert (pipe() - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("method", ["ddim", "ab", "euler_ancestral"])
def test_rules_guide_the_drop_in(method):
    pipe = twice(lambda p, u, c, x, i: cfg(u, c))
    pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}) as hook:
        found = pipe()
    wanted = twice(lambda p, u, c, x, i: cfg(u, c, 5.0))
    wanted.scheduler = sampler.scheduler(method, wanted.scheduler)
    wanted = wanted()
    assert hook.form.scale == pytest.approx(S, rel=1e-3)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture(scope="module", params=COSMOS)
def cosmos(request):
    recipe = TINY[request.param]
    return recipe, recipe.build(request.param)


@pytest.mark.parametrize("method", [None, "ddim", "ab"])
def test_calls_of_one_branch_are_guided(cosmos, method):
    """Their sample is read, for a preview, before the step is taken back."""
    recipe, pipe = cosmos
    stock, own = pipe.scheduler, recipe.called(pipe, guidance_scale=1.0)
    seen = []
    try:
        if method is not None:
            pipe.scheduler = sampler.scheduler(method, stock)
        plain = recipe.called(pipe, guidance_scale=1.0)
        with sampler.guide(pipe, "none") as hook:
            hook.on_step = seen.append
            found = recipe.called(pipe, guidance_scale=1.0)
    finally:
        pipe.scheduler = stock
    assert hook.nfe == [3] and [one.index for one in seen] == [1, 2, 3]
    assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(recipe.called(pipe, guidance_scale=1.0), own)


def test_a_hosted_run_with_ddim_is_the_stock_run(cosmos):
    recipe, pipe = cosmos
    own = {k: v for k, v in recipe.inputs(type(pipe)).items() if v is not None}
    own["num_frames"] = 9
    call = {"height": 32, "width": 32, "output_type": "latent", "num_inference_steps": 3}
    with stand_ins(type(pipe)):
        generator = torch.Generator().manual_seed(4)
        stock = pipe(prompt=["a fox"], guidance_scale=2.0, generator=generator, **call, **own)
        result = sampler.load(pipe).generate(
            "a fox",
            seeds=4,
            steps=3,
            sampler="ddim",
            guidance={"name": "cfg", "scale": 3.0},  # the pipeline adds its scale to 1
            height=32,
            width=32,
            inputs=own,
            output="latent",
        )
    assert result.nfe == [6]
    gap = (result.latents - stock.frames).abs().max()
    assert gap <= 1e-5 * stock.frames.abs().max()


def stepped(method="ab", steps=3):
    found = sampler.scheduler(method, EDMEulerScheduler(sigma_data=0.7))
    found.set_timesteps(steps)
    x = torch.ones(2, 4, 8, 8) * found.init_noise_sigma
    out = found.scale_model_input(x, found.timesteps[0])
    return found, x, found.step(out, found.timesteps[0], x, return_dict=False)


def test_an_answer_that_is_not_read_is_still_a_step():
    found, x, _ = stepped()
    other, _, answer = stepped()
    assert len(answer) == 2 and torch.equal(answer[0], [*answer][0])
    x = answer[0]
    for one in (found, other):
        out = one.scale_model_input(x, one.timesteps[1])
        one.x = one.step(out, one.timesteps[1], x, return_dict=False)[0]
    assert torch.equal(found.x, other.x)
    with pytest.raises(IndexError):
        answer[2]


def test_a_given_x0_takes_the_place_of_the_output():
    found, x, answer = stepped()
    x0 = answer[1]
    found._step_index -= 1
    assert found.step_index is None
    again = found.step(0 * x, found.timesteps[0], x, return_dict=False, pred_original_sample=x0)
    assert torch.equal(again[1], x0)
    assert (again[0] - answer[0]).abs().max() <= 1e-6 * x.max()


@pytest.mark.parametrize("back", [0, 2])
def test_other_positions_are_refused(back):
    found, *_ = stepped()
    with pytest.raises(ValueError, match="a drop-in only takes its last step back; keep"):
        found._step_index -= back
    found._step_index -= 1
    with pytest.raises((ValueError, TypeError)):
        found._step_index -= 1


def test_the_factor_on_the_input_is_the_stock_one():
    found, *_ = stepped()
    stock, sigma = EDMEulerScheduler(sigma_data=0.7), torch.tensor([0.001, 2.0, 80.0])
    wanted = stock._get_conditioning_c_in(sigma)
    assert torch.allclose(found._get_conditioning_c_in(sigma), wanted, rtol=1e-6)


def test_others_take_no_step_back():
    found = sampler.scheduler("ab", tiny.sd().scheduler)
    assert not hasattr(found, "_get_conditioning_c_in")
    with pytest.raises(ModelError, match="has no '_step_index'"):
        found._step_index -= 1
