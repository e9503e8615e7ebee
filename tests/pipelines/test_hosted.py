"""Hosted engines: stock pipelines without an adapter, equal to their own call."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPAGPipeline

import sampler
from sampler.engine import hosted_output
from sampler.pipelines.call_arguments import RESERVED
from sampler.stock.other_stages import tell_of_output
from tests import tiny
from tests.classic.table import TINY
from tests.guidance.stock import Rows
from tests.guidance.stock_hosted import controlnet, half_mask, inpaint, pag, picture, pix2pix

pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = (7, 8)
PROMPTS = ["a red fox", "two green apples"]
CFG = {"name": "cfg", "scale": 4.0}
SIZE = {"height": 32, "width": 32}
CASES = {  # a pipeline, its inputs, and further arguments of `generate`
    "controlnet": (controlnet, lambda: {"image": picture()}, SIZE),
    "inpaint": (inpaint, lambda: {"image": picture(), "mask_image": half_mask()}, SIZE),
    "inpaint without a mask in the network": (
        lambda: inpaint(4),
        lambda: {"image": picture(), "mask_image": half_mask()},
        SIZE,
    ),
    "pix2pix": (pix2pix, lambda: {"image": picture(), "image_guidance_scale": 1.5}, {}),
    "perturbed attention": (pag, lambda: {"pag_scale": 2.0}, SIZE),
}


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def stock(pipe, inputs, more, scale=4.0, steps=5):
    """Latents of one call per image: in a batch, images are encoded with the first generator."""
    made = [
        pipe(
            prompt=prompt,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **inputs,
            **more,
        ).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    return torch.cat(made)


def hosted(engine, inputs, more, **options):
    settings = {"seeds": list(SEEDS), "steps": 5, "guidance": CFG, "output": "latent"}
    return engine.generate(PROMPTS, inputs=inputs, **{**settings, **more, **options})


@pytest.mark.parametrize("case", CASES)
def test_ddim_and_cfg_are_the_stock_pipeline(case):
    build, inputs, more = CASES[case]
    pipe = build()
    plain = stock(pipe, inputs(), more)
    before = (type(pipe), pipe.scheduler, dict(vars(pipe)), list(pipe.config.items()))
    engine = sampler.load(pipe)
    result = hosted(engine, inputs(), more)
    assert engine.hosted and result.images is None
    assert (result.latents - plain).abs().max() <= 1e-5 * plain.abs().max()
    branches = 3 if case in ("pix2pix", "perturbed attention") else 2
    assert result.nfe == [5 * branches] * 2
    assert before[:2] == (type(pipe), pipe.scheduler) and before[3] == list(pipe.config.items())
    assert all(vars(pipe)[name] is value for name, value in before[2].items())
    assert torch.equal(stock(pipe, inputs(), more), plain)


@pytest.mark.parametrize("case", CASES)
def test_config_makes_the_images_again(case):
    build, inputs, more = CASES[case]
    engine = sampler.load(build())
    result = hosted(
        engine, inputs(), more, output="pil", sampler="ghvb", guidance={"name": "apg", "scale": 5.0}
    )
    again = engine.generate(**result.config)
    assert np.array_equal(pixels(again.images), pixels(result.images))
    assert result.images[0].size == (32, 32) and again.nfe == result.nfe
    other = hosted(engine, inputs(), more, output="pil", guidance={"name": "apg", "scale": 9.0})
    assert not np.array_equal(pixels(other.images), pixels(result.images))


@pytest.mark.parametrize("case", ["controlnet", "inpaint"])
def test_adaptive_guidance_evaluates_fewer_rows(case):
    build, inputs, more = CASES[case]
    pipe = build()
    counted = Rows(pipe.unet)
    rule = {"name": "adaptive", "rule": CFG, "threshold": -1.0}
    result = hosted(sampler.load(pipe), inputs(), more, guidance=rule)
    assert sum(result.nfe) == sum(counted.rows) < 20
    assert result.latents.isfinite().all()


def test_apg_beside_a_controlnet_is_apg_in_the_engine():
    """On a network with the ControlNet folded in."""
    pipe = controlnet()
    rule = {"name": "apg", "scale": 6.0, "norm_threshold": 2.0}
    found = hosted(sampler.load(pipe), {"image": picture()}, SIZE, guidance=rule)
    image = pipe.prepare_image(picture(), 32, 32, 1, 1, torch.device("cpu"), torch.float32)
    plain, unet = tiny.sd(), pipe.unet
    plain.unet, forward = unet, unet.forward

    def folded(sample, t, encoder_hidden_states, **more):
        down, mid = pipe.controlnet(
            sample,
            t,
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=image.expand(len(sample), -1, -1, -1),
            return_dict=False,
        )
        return forward(
            sample,
            t,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            **more,
        )

    plain.text_encoder, plain.vae = pipe.text_encoder, pipe.vae
    unet.forward = folded
    own = sampler.load(plain).generate(
        PROMPTS, seeds=list(SEEDS), steps=5, guidance=rule, output="latent", **SIZE
    )
    assert (found.latents - own.latents).abs().max() <= 1e-5 * own.latents.abs().max()


def test_an_image_does_not_depend_on_its_batch():
    engine = sampler.load(inpaint())
    images = [picture(1), picture(2), picture(1)]
    masks = [half_mask()] * 3
    prompts, seeds = ["a", "b", "a"], [1, 2, 1]
    result = engine.generate(
        prompts, seeds=seeds, steps=3, inputs={"image": images, "mask_image": masks}, **SIZE
    )
    made = pixels(result.images)
    alone = engine.generate(
        "b", seeds=2, steps=3, inputs={"image": picture(2), "mask_image": half_mask()}, **SIZE
    )
    assert (
        np.abs(made[0] - made[2]).max() == 0 and np.abs(made[1] - pixels(alone.images)).max() <= 1
    )
    assert np.abs(made[0] - made[1]).max() > 5


def test_files_are_recorded_by_their_content(tmp_path):
    picture(3).save(tmp_path / "control.png")
    engine = sampler.load(controlnet())
    given = {"image": str(tmp_path / "control.png")}
    first = engine.generate("a fox", seeds=1, steps=3, inputs=given, **SIZE)
    in_memory = engine.generate("a fox", seeds=1, steps=3, inputs={"image": picture(3)}, **SIZE)
    assert np.array_equal(pixels(first.images), pixels(in_memory.images))
    digest = hashlib.sha256((tmp_path / "control.png").read_bytes()).hexdigest()
    recorded = first.config["inputs"]["image"]
    assert recorded == [{"file": str(tmp_path / "control.png"), "sha256": digest}]
    url = {"image": Path(tmp_path / "control.png").as_uri()}
    assert engine.generate("a fox", seeds=1, steps=3, inputs=url, **SIZE).config == first.config
    picture(4).save(tmp_path / "control.png")
    with pytest.raises(sampler.SamplerError, match="content has changed"):
        engine.generate(**first.config)


def test_a_class_with_an_adapter_is_hosted_for_its_inputs():
    pipe = tiny.sdxl()
    engine = sampler.load(pipe)
    assert not engine.hosted
    settings = {"seeds": 1, "steps": 4, "guidance": CFG, "output": "latent", **SIZE}
    own = engine.generate("a fox", **settings).latents
    same = engine.generate("a fox", inputs={"original_size": (32, 32)}, **settings).latents
    other = engine.generate("a fox", inputs={"original_size": (512, 64)}, **settings).latents
    assert (own - same).abs().max() <= 1e-5 * own.abs().max()
    assert (own - other).abs().max() > 1e-3 * own.abs().max()


def test_folders_are_hosted(tmp_path):
    pipe = inpaint()
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    inputs = {"image": picture(), "mask_image": half_mask()}
    wanted = hosted(sampler.load(pipe), inputs, SIZE)
    engine = sampler.load(tmp_path, device="cpu")
    assert engine.hosted and torch.equal(hosted(engine, inputs, SIZE).latents, wanted.latents)


class OneAtATimePAG(StableDiffusionPAGPipeline):
    def __call__(
        self,
        prompt=None,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=None,
        output_type="pil",
    ):
        if isinstance(generator, list):
            raise TypeError("randn(): argument 'generator' must be torch.Generator, not list")
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        return super().__call__(**given, height=32, width=32)


def test_pipelines_of_one_generator_are_called_once_per_image(caplog):
    pipe = pag()
    parts = {**pipe.components, "requires_safety_checker": False, "pag_applied_layers": ["mid"]}
    engine = sampler.load(OneAtATimePAG(**parts))
    counted = Rows(pipe.unet)
    found = [hosted(engine, {}, {}).latents for _ in range(2)]
    assert set(counted.rows) == {3} and torch.equal(*found)
    wanted = hosted(sampler.load(pipe), {}, SIZE).latents
    assert (found[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert sum("one at a time" in record.message for record in caplog.records) == 1


class Silent(StableDiffusionInpaintPipeline):
    """A pipeline that hands on no image."""

    def __call__(self, prompt=None, image=None, mask_image=None, num_inference_steps=3,
                 guidance_scale=7.5, generator=None, output_type="pil"):  # fmt: skip
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__call__(**given, height=32, width=32)
        return ("nothing",)


def test_an_output_that_is_no_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    half_mask().save("mask.png")
    engine = sampler.load(Silent(**inpaint().components, requires_safety_checker=False))
    inputs = {"image": "a.png", "mask_image": "mask.png"}
    with pytest.raises(sampler.SamplerError, match="returned str, which is not one value"):
        engine.generate("a", seeds=1, steps=2, inputs=inputs)
    with pytest.raises(sampler.SamplerError):
        engine.generate("a", seeds=1, steps=2, inputs=inputs, out="run")
    journal = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.jsonl"))
    assert "returned str, which is not one value for each image" in journal


@pytest.mark.parametrize("made", [[picture()], [[picture(), picture()]], np.zeros((1, 8, 8, 3))])
def test_latents_of_a_pipeline_that_gives_pixels_are_refused(made):
    with pytest.raises(sampler.SamplerError, match="gives no latents but pixels"):
        hosted_output.converted(made, "latent", 1)
    latents = torch.zeros(1, 4, 2, 2)
    assert torch.equal(hosted_output.converted([*latents], "latent", 1)[0], latents[0])


def test_a_scale_of_guidance_by_an_empty_prompt_is_no_input_of_the_network():
    name = "LDMTextToImagePipeline"  # which takes no negative prompt
    pipe = TINY[name].build(name)
    engine = sampler.load(pipe)
    settings = {"seeds": 1, "steps": 3, "sampler": "ddim", "output": "tensor", **SIZE}
    found = engine.generate("a red fox", guidance=CFG, **settings).images[0]
    plain = pipe(
        "a red fox", guidance_scale=4.0, num_inference_steps=3, output_type="pt", **SIZE,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert torch.allclose(found, torch.as_tensor(np.asarray(plain)), atol=1e-5)
    with pytest.raises(ValueError, match="evaluates an unconditional branch.*use 'cfg'"):
        engine.generate("a red fox", guidance={"name": "embedded", "scale": 4.0}, **settings)


def test_a_schedule_of_scales_gives_way_to_the_rule():
    name = "Ideogram4Pipeline"
    pipe = TINY[name].build(name)
    engine = sampler.load(pipe)
    assert engine.pipeline.default_guidance == {"name": "cfg", "scale": 7.0}
    settings = {"seeds": 1, "steps": 3, "sampler": "ddim", "output": "tensor", **SIZE}
    inputs = {"max_sequence_length": 64}
    found = engine.generate("a red fox", inputs=inputs, guidance=CFG, **settings).images[0]
    plain = pipe(
        "a red fox", guidance_scale=4.0, guidance_schedule=None, num_inference_steps=3,
        output_type="pt", generator=torch.Generator().manual_seed(1), **inputs, **SIZE,
    ).images[0]  # fmt: skip
    assert torch.allclose(found, plain, atol=1e-5)
    with pytest.raises(ValueError, match="set by the engine; give the scale"):
        engine.generate("a fox", inputs={"guidance_schedule": [7.0] * 3}, **settings)


def test_a_video_whose_sound_is_dropped_and_not_guided_says_so_once(caplog):
    recipe = TINY["LTX2Pipeline"]
    engine = sampler.load(recipe.build("LTX2Pipeline"))
    inputs = {name: value for name, value in recipe.call.items() if name not in RESERVED}
    tell_of_output.cache_clear()
    hosted_output._note.cache_clear()
    for _ in range(2):
        result = engine.generate("a fox", seeds=1, steps=2, guidance=CFG, inputs=inputs, **SIZE)
    assert len(result.images[0]) == 5
    said = [record.message for record in caplog.records if record.name == "sampler"]
    assert said == [
        "LTX2Pipeline steps another output of its network too, such as sound, which keeps the "
        "pipeline's own guidance.",
        "LTX2Pipeline returns audio too, but only its frames are kept.",
    ]


def test_guess_mode_is_refused_before_any_call():
    pipe = controlnet()
    counted = [Rows(pipe.unet), Rows(pipe.controlnet)]
    with pytest.raises(ValueError, match="cannot serve guess_mode"):
        hosted(sampler.load(pipe), {"image": picture(), "guess_mode": True}, SIZE)
    assert [one.rows for one in counted] == [[], []]


def test_pictures_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sampler.core.image_files.MAX_PIXELS", 32 * 32 - 1)
    picture().save(tmp_path / "large.png")
    pipe = inpaint()
    counted = Rows(pipe.unet)
    inputs = {"image": str(tmp_path / "large.png"), "mask_image": half_mask()}
    with pytest.raises(sampler.SamplerError, match="large.png"):
        hosted(sampler.load(pipe), inputs, SIZE)
    assert counted.rows == []


@pytest.mark.parametrize("given", [[1, 2], "image=a.png", 3, {1: 2}])
def test_inputs_that_are_no_mapping_are_refused(given):
    with pytest.raises(ValueError, match="must be a mapping of names of arguments"):
        sampler.load(inpaint()).generate("a", inputs=given)


WRONG = {
    "text as a number": ({"strength": "high"}, "strength = 'high' must be a number"),
    "nothing as a number": ({"strength": None}, "strength = None must be a number"),
    "a number as an image": ({"image": 3}, "image = 3 must be an image, a tensor, or the path"),
    "text as an image": ({"image": "a fox"}, "image = 'a fox' must be an image, a tensor, or the"),
    "one wrong item": ({"image": [picture(), 3]}, "must be an image, a tensor, or the path"),
    "unknown": ({"strenght": 0.5}, r"no argument 'strenght' \(did you mean 'strength'"),
    "set by the engine": ({"num_inference_steps": 3}, "is set by the engine; give steps"),
    "scale": ({"guidance_scale": 3}, "give the scale of the guidance rule"),
    "missing file": ({"image": "nowhere.png"}, "input image: nowhere.png: no such file"),
    "network": ({"image": "https://x.y/z.png"}, "is on the network; download it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused_before_any_call(name):
    inputs, words = WRONG[name]
    pipe = inpaint()
    counted = Rows(pipe.unet)
    with pytest.raises((ValueError, sampler.SamplerError), match=words) as error:
        hosted(sampler.load(pipe), {"image": picture(), "mask_image": half_mask(), **inputs}, SIZE)
    assert "\n" not in str(error.value) and counted.rows == []


def test_what_a_hosted_engine_cannot_do_is_refused(tmp_path):
    engine = sampler.load(inpaint())
    for call in (
        lambda: engine.run(torch.zeros(1), []),
        lambda: engine.steps(None, []),
        lambda: sampler.finetune(engine, trainer="alignprop", reward="brightness",
                                 prompts=["a"], out=tmp_path, updates=1),
    ):  # fmt: skip
        with pytest.raises(sampler.SamplerError, match="is hosted"):
            call()
    with pytest.raises(ValueError, match="weak has no effect"):
        sampler.load(inpaint(), weak=tiny.sd().unet)
    with pytest.raises(ValueError, match="needs 'weak'"):
        hosted(
            engine, {"image": picture(), "mask_image": half_mask()}, SIZE, guidance="autoguidance"
        )


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_takes_the_states_of_an_earlier_layer(skip):
    """Equal to an encoder without its last layers, whose own norm follows; nothing stays behind.

    Without guidance, since the stock pipeline encodes the negative prompt with all layers.
    """
    pipe, shorter = tiny.sd(), tiny.sd()
    encoder: Any = shorter.text_encoder
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    del layers[len(layers) - skip :]
    names = [*pipe.text_encoder.state_dict()], "text_model" in vars(pipe.text_encoder)
    skipped = hosted(sampler.load(pipe).as_hosted(), {"clip_skip": skip}, SIZE, guidance="none")
    wanted = hosted(sampler.load(shorter).as_hosted(), {}, SIZE, guidance="none")
    plain = hosted(sampler.load(tiny.sd()).as_hosted(), {}, SIZE, guidance="none")
    torch.testing.assert_close(skipped.latents, wanted.latents)
    assert (skipped.latents - plain.latents).abs().max() > 1e-3
    assert names == ([*pipe.text_encoder.state_dict()], "text_model" in vars(pipe.text_encoder))


def test_inputs_choose_the_class_of_the_call():
    pipe = tiny.sd()
    pipe.to(torch.float16)
    engine: Any = sampler.load(pipe).as_hosted()
    start = engine.serving(["image"])
    masked = engine.serving(["image", "mask_image", "strength"])
    assert engine.serving(["clip_skip"]) is engine
    with pytest.raises(ValueError, match="'ip_adapter_image' needs an IP-Adapter"):
        engine.serving(["ip_adapter_image"])
    assert [type(one.pipeline.pipe).__name__ for one in (start, masked)] == [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ]
    for one in (start, masked):
        assert one.pipeline.pipe.components == pipe.components
        assert one.pipeline.pipe.unet.dtype == torch.float16
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no argument 'imaeg'"):
        engine.serving(["imaeg"])
    with pytest.raises(ValueError, match="strength = 0.5 has no effect without image"):
        engine.generate("a", strength=0.5, inputs={"image": picture()})
    with pytest.raises(ValueError, match="image is given twice; leave it out of inputs"):
        engine.generate("a", image=picture(), inputs={"image": picture()})
