"""Drop-ins in the pipelines of Stable Audio and Dance Diffusion, whose levels are their own."""

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, IPNDMScheduler

import sampler
from tests.classic.table import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5


@pytest.fixture(scope="module")
def audio():
    recipe = TINY["StableAudioPipeline"]
    return recipe, recipe.build("StableAudioPipeline")


@pytest.mark.parametrize("ramp", ["exponential", "karras"])
@pytest.mark.parametrize("order, method", [(1, "ddim"), (2, "dpmpp_2m")])
def test_stable_audio_makes_its_own_sounds(audio, ramp, order, method):
    recipe, pipe = audio
    own = pipe.scheduler
    kind = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_schedule": ramp}
    try:
        pipe.scheduler = EDMDPMSolverMultistepScheduler(**kind, solver_order=order)
        plain = recipe.called(pipe, num_inference_steps=STEPS)
        pipe.scheduler = sampler.scheduler(method, pipe.scheduler)
        found = recipe.called(pipe, num_inference_steps=STEPS)
    finally:
        pipe.scheduler = own
    assert plain.std() > 1e-4 and (found - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_hosted_sound_is_the_stock_one(audio):
    _, pipe = audio
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "audio_end_in_s": 2.0}
    stock = pipe(["a bell"], generator=torch.Generator().manual_seed(4), **call).audios
    result = sampler.load(pipe).generate(
        "a bell", seeds=4, steps=STEPS, sampler="dpmpp_2m", guidance={"name": "cfg", "scale": 3.0},
        inputs={"audio_end_in_s": 2.0},
    )  # fmt: skip
    assert result.nfe == [2 * STEPS]
    assert (torch.as_tensor(result.images[0]) - stock[0]).abs().max() <= 1e-5 * stock.abs().max()


def test_the_steps_of_dance_diffusion_are_those_of_ab():
    """But the first, in which the stock scheduler divides by alpha = 0 and takes x0 for 0."""
    stock, drop = IPNDMScheduler(), sampler.scheduler({"name": "ab", "order": 4}, IPNDMScheduler())
    for one in (stock, drop):
        one.set_timesteps(8)
    x = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k, (t, own) in enumerate(zip(stock.timesteps, drop.timesteps, strict=True)):
        out = torch.tanh(3 * x) - 0.2 * t
        wanted, found = (s.step(out, at, x).prev_sample for s, at in ((stock, t), (drop, own)))
        gap = (found - wanted).abs().max()
        assert gap > 1e-3 if k == 0 else gap < 1e-5
        x = wanted


def test_dance_diffusion_runs_hosted():
    recipe = TINY["DanceDiffusionPipeline"]
    pipe = recipe.build("DanceDiffusionPipeline")
    inputs = {"audio_length_in_s": 1.0}
    engine = sampler.load(pipe)
    found = [
        engine.generate("", seeds=s, steps=STEPS, sampler="ab", inputs=inputs) for s in (1, 2, 1)
    ]
    a, b, again = (torch.as_tensor(one.images[0]) for one in found)
    assert a.isfinite().all() and torch.equal(a, again) and not torch.equal(a, b)
    assert found[0].nfe == [STEPS] and type(pipe.scheduler) is IPNDMScheduler
