"""Images of A1111 and ComfyUI: their settings are read, and the images made again."""

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sampler
from sampler.cli import main
from sampler.core.errors import UsageError
from sampler.runs.foreign import read_foreign
from sampler.runs.metadata import foreign_metadata, read_record
from sampler.workers.foreign import settings_of_image

A1111 = (
    "a fox <lora:add_detail:0.8>\non a green background\nNegative prompt: blurry,\nlow quality\n"
    "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 7, Size: 64x64, "
    'Model hash: 0123, Model: some, Clip skip: 2, Lora hashes: "add_detail: 12, b: 3", '
    "Version: v1.10.1"
)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


K_SAMPLER = {
    "1": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
    "2": node("CLIPTextEncode", text="a fox", clip=["1", 1]),
    "3": node("CLIPTextEncode", text=["7", 0], clip=["1", 1]),
    "7": node("PrimitiveString", value="blurry"),
    "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    "5": node(
        "KSampler", seed=2**63 + 5, steps=3, cfg=4.5, sampler_name="dpmpp_2m_sde_gpu",
        scheduler="exponential", denoise=1.0, model=["1", 0], positive=["2", 0],
        negative=["3", 0], latent_image=["4", 0],
    ),
}  # fmt: skip
CUSTOM = {
    "1": node("CLIPTextEncode", text="a fox"),
    "2": node("FluxGuidance", guidance=3.5, conditioning=["1", 0]),
    "3": node("BasicGuider", conditioning=["2", 0]),
    "4": node("KSamplerSelect", sampler_name="res_multistep"),
    "5": node("BasicScheduler", scheduler="simple", steps=4, denoise=1.0),
    "6": node("RandomNoise", noise_seed=3),
    "7": node("EmptySD3LatentImage", width=64, height=32),
    "8": node(
        "SamplerCustomAdvanced", noise=["6", 0], guider=["3", 0], sampler=["4", 0],
        sigmas=["5", 0], latent_image=["7", 0],
    ),
}  # fmt: skip


def png(**texts):
    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (64, 64)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_the_text_of_a1111():
    found = foreign_metadata(png(parameters=A1111))
    assert (found.prompt, found.negative_prompt) == (
        "a fox \non a green background",
        "blurry,\nlow quality",
    )
    assert (found.steps, found.sampler, found.scale) == (3, "DPM++ 2M Karras", 4.5)
    assert (found.seed, found.width, found.height) == (7, 64, 64)
    assert found.unused == (
        "Model hash", "Model", "Clip skip", "Lora hashes", "Version", "<lora:add_detail:0.8>",
    )  # fmt: skip


def test_the_workflow_of_comfyui():
    found = foreign_metadata(png(prompt=json.dumps(K_SAMPLER), workflow="{}"))
    assert (found.prompt, found.negative_prompt) == ("a fox", "blurry")
    assert (found.sampler, found.grid) == ("dpmpp_2m_sde_gpu", "exponential")
    assert (found.steps, found.scale, found.seed) == (3, 4.5, 2**63 + 5)
    assert (found.width, found.height) == (64, 64)
    assert found.unused == ("CheckpointLoaderSimple",)


def test_the_custom_sampler_of_comfyui():
    found = foreign_metadata(png(prompt=json.dumps(CUSTOM)))
    assert (found.prompt, found.sampler, found.grid) == ("a fox", "res_multistep", "simple")
    assert (found.steps, found.scale, found.seed) == (4, None, 3)
    assert (found.width, found.height, found.unused) == (64, 32, ("FluxGuidance",))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"parameters": "a fox"}, "has no line 'Steps: ..., Sampler: ...'"),
        ({"parameters": "a\nSteps: many, Sampler: DDIM"}, "Steps = 'many' in the image is not"),
        ({"parameters": "a\nSteps: 3, Denoising strength: 0.5"}, "made from another one"),
        ({"workflow": "{}"}, "the drawing of a ComfyUI workflow"),
        ({"prompt": "no json"}, "workflow cannot be read"),
        ({"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": 3}})}, "cannot be read"),
        ({"prompt": "{}"}, "has 0 sampler nodes"),
        ({"prompt": json.dumps({**K_SAMPLER, "9": K_SAMPLER["5"]})}, "has 2 sampler nodes"),
        (
            {"prompt": json.dumps({**K_SAMPLER, "4": node("VAEEncode", pixels=["8", 0])})},
            "made from another one",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused(texts, message):
    with pytest.raises(UsageError, match=message):
        read_foreign(texts)
    assert read_foreign({"else": "a"}) is None


def test_links_in_a_circle_end():
    loop = {**K_SAMPLER, "2": node("CLIPTextEncode", text=["2", 0])}
    assert read_foreign({"prompt": json.dumps(loop)}).prompt == ""


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


def test_names_become_ours(engine):
    settings = settings_of_image(engine, read_foreign({"parameters": A1111}))
    assert (settings.sampler["name"], settings.grid, settings.steps) == ("dpmpp_2m", "karras", 3)
    assert settings.guidance["scale"] == 4.5
    settings = settings_of_image(engine, read_foreign({"prompt": json.dumps(K_SAMPLER)}))
    assert (settings.sampler["name"], settings.grid) == ("dpmpp_2m_sde", "exponential")
    with pytest.raises(ValueError, match="the nearest is 'heun'"):
        settings_of_image(engine, read_foreign({"parameters": "a\nSteps: 3, Sampler: DPM2"}))


def test_replay_and_show(tmp_path, capsys, engine):
    image, again = tmp_path / "a.png", tmp_path / "again.png"
    image.write_bytes(png(parameters=A1111))
    assert main(["show", str(image)]) == 0
    assert json.loads(capsys.readouterr().out)["sampler"] == "DPM++ 2M Karras"
    assert main(["replay", str(image), "-o", str(again)]) == 2
    assert "name its model with --model" in capsys.readouterr().err
    assert main(["replay", str(image), "-o", str(again), "--model", "bundled"]) == 0
    told = capsys.readouterr().err
    assert "Clip skip" in told and "<lora:add_detail:0.8>" in told
    record = read_record(again.read_bytes())["record"]
    assert (record["sampler"]["name"], record["grid"], record["seed"]) == ("dpmpp_2m", "karras", 7)
    right = engine.generate(
        record["prompt"], negative=record["negative_prompt"], seeds=7, steps=3,
        sampler="dpmpp_2m", grid="karras", guidance=record["guidance"], height=64, width=64,
    ).images[0]  # fmt: skip
    assert Image.open(again).tobytes() == right.tobytes()
