"""Pipelines of several stages or runs in one call: which steps are sampled and guided."""

import warnings

import numpy as np
import pytest
import torch

import sampler
from sampler.pipelines.call_arguments import reserved, scale_name, scheduler_name, steps_name
from sampler.stock import other_stages
from tests.classic.table import TINY

STAGES = {
    "UnCLIPPipeline": "decoder_scheduler",
    "UnCLIPImageVariationPipeline": "decoder_scheduler",
    "StableCascadeCombinedPipeline": "scheduler",
}
FRAMES = {"video_length": 2, "t0": 1, "t1": 2}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", STAGES)
def test_the_decoder_alone_is_guided_and_that_is_told_once(name, caplog):
    recipe = TINY[name]
    pipe = recipe.build(name)
    plain, wanted = recipe.called(pipe), recipe.called(pipe, decoder_guidance_scale=2.0)
    other_stages._tell_of_stage.cache_clear()
    with sampler.guide(pipe, {"name": "cfg", "scale": 2.0}) as calls:
        found = [recipe.called(pipe) for _ in range(2)]
    for one in found:
        assert (one - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - plain).abs().max() > 1e-3
    steps = recipe.settings(type(pipe)).get(steps_name(type(pipe)))
    assert calls.nfe == [2 * steps]
    others = [n for n in pipe.components if n.endswith("scheduler") and n != STAGES[name]]
    told = [r.getMessage() for r in caplog.records if "several stages" in r.getMessage()]
    assert len(told) == len(others) and f"those of its {STAGES[name]}," in told[0]
    for one, text in zip(sorted(others), sorted(told), strict=True):
        assert f"the stage of its {one} stays" in text
    assert torch.equal(recipe.called(pipe), plain)


@pytest.mark.parametrize("name", STAGES)
def test_the_names_of_the_guided_stage_are_set_by_the_engine(name):
    recipe = TINY[name]
    pipe = recipe.build(name)
    cls = type(pipe)
    assert scheduler_name(cls) == STAGES[name] and scale_name(cls) == "decoder_guidance_scale"
    assert {steps_name(cls), scale_name(cls)} <= set(reserved(cls))
    engine = sampler.load(pipe)
    default = 8.0 if "UnCLIP" in name else None
    assert engine.guidance.name == ("cfg" if default else "none")
    assert getattr(engine.guidance, "scale", None) == default
    for one, instead in ((steps_name(cls), "steps"), (scale_name(cls), "the scale")):
        with pytest.raises(ValueError, match=f"{one}' is set by the engine; give {instead}"):
            engine.generate("", seeds=1, inputs={one: 3})


def test_a_hosted_decoder_takes_steps_scale_and_sampler():
    recipe = TINY["UnCLIPPipeline"]
    pipe = recipe.build("UnCLIPPipeline")
    before = pipe.decoder_scheduler
    engine = sampler.load(pipe)
    few = {"prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}

    def made(prompts, seeds, name="ab", scale=3.0):
        rule = {"name": "cfg", "scale": scale}
        return engine.generate(
            prompts, seeds=seeds, steps=4, sampler=name, guidance=rule, inputs=few, output="tensor"
        )

    both = made(["a fox", "two cars"], [1, 2])
    assert both.nfe == [8, 8] and both.images.shape == (2, 3, 32, 32)
    for k, one in enumerate((made("a fox", 1), made("two cars", 2))):
        assert (one.images[0] - both.images[k]).abs().max() < 1e-4
    for other in (made("a fox", 1, "ghvb"), made("a fox", 1, scale=6.0)):
        assert (other.images[0] - both.images[0]).abs().max() > 1e-3
    assert pipe.decoder_scheduler is before
    with pytest.raises(sampler.SamplerError, match="no latents but pixels"):
        engine.generate("a fox", seeds=1, steps=2, inputs=few, output="latent")


@pytest.mark.parametrize("name", ["TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"])
def test_a_video_of_frames_as_rows_is_hosted(name, caplog):
    recipe = TINY[name]
    pipe = recipe.build(name)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32}
    stock = pipe("a fox", generator=torch.Generator().manual_seed(1), **given, **FRAMES).images
    pipe = recipe.build(name)
    processors = [type(one) for one in pipe.unet.attn_processors.values()]
    engine = sampler.load(pipe).as_hosted()

    def made(prompts, seeds, output="pil"):
        return engine.generate(
            prompts, seeds=seeds, steps=4, sampler="ddim", guidance={"name": "cfg", "scale": 3.0},
            height=32, width=32, inputs=FRAMES, output=output,
        )  # fmt: skip

    both = made(["two cars", "a fox"], [2, 1])  # the class takes one prompt at a time
    assert sum("one at a time" in r.getMessage() for r in caplog.records) == 1
    assert len(both.images) == 2 and len(both.images[1]) == 2
    frames = np.stack([np.asarray(frame) for frame in both.images[1]])
    assert np.array_equal(frames, (stock * 255).round().astype("uint8"))
    # one frame in the first step, one in the second, both in the last three; two branches
    assert both.nfe == [16, 16]
    video = made("a fox", 1, "tensor").images
    assert (video[0] - torch.from_numpy(stock).permute(3, 0, 1, 2)).abs().max() < 1e-5
    assert [type(one) for one in pipe.unet.attn_processors.values()] == processors


def test_processors_are_given_back_where_a_call_fails():
    recipe = TINY["TextToVideoZeroPipeline"]
    pipe = recipe.build("TextToVideoZeroPipeline")
    before = pipe.unet.attn_processors
    with pytest.raises(IndexError), sampler.guide(pipe, "cfg"):
        recipe.called(pipe, prompt=["a fox", "two cars"], negative_prompt=["", ""])
    assert all(pipe.unet.attn_processors[name] is one for name, one in before.items())
