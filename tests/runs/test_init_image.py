"""`--init-image`, `--strength` and `--mask`: image to image and inpainting on the command line."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

import sampler
from sampler.cli import main
from tests import tiny
from tests.guidance.stock_hosted import controlnet, half_mask, inpaint, picture

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.sd().save_pretrained(root / "plain")
    inpaint().save_pretrained(root / "inpaint")
    controlnet().save_pretrained(root / "controlnet")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(size=(48, 32)).save("start.png")
    half_mask((48, 32)).save("mask.png")
    half_mask((32, 32)).save("small.png")
    return tmp_path


def generate(*args, out="run"):
    line = ["generate", "a fox", "--seed", 3, "--steps", 5, "--scale", 4, "--device", "cpu", "-q"]
    return main([*map(str, line), "-o", out, *map(str, args)])


def made(folder, out="run"):
    (path,) = (folder / out).rglob("*.png")
    return np.asarray(Image.open(path), dtype=int)


def stock(cls, **inputs):
    pipe = tiny.sd()
    pipe = cls(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    found = pipe("a fox", num_inference_steps=5, guidance_scale=4, generator=generator, **inputs)
    return np.asarray(found.images[0], dtype=int)


@pytest.mark.parametrize(("options", "strength"), [(("--strength", 0.8), 0.8), ((), 0.6)])
def test_image_to_image_is_the_stock_class(models, folder, options, strength):
    assert generate("--model", models / "plain", "--init-image", "start.png", *options) == 0
    start = Image.open("start.png")
    wanted = stock(StableDiffusionImg2ImgPipeline, image=start, strength=strength)
    assert made(folder).shape == (32, 48, 3) and np.abs(made(folder) - wanted).max() <= 1


def test_inpainting_is_the_stock_class_at_the_size_of_the_image(models, folder):
    given = ("--init-image", "start.png", "--mask", "mask.png")
    assert generate("--model", models / "plain", *given) == 0
    files = {"image": Image.open("start.png"), "mask_image": Image.open("mask.png")}
    wanted = stock(StableDiffusionInpaintPipeline, **files, height=32, width=48)
    assert made(folder).shape == (32, 48, 3) and np.abs(made(folder) - wanted).max() <= 1


def test_a_configuration_sets_the_strength(models, folder):
    (folder / "c.yaml").write_text("inputs: {strength: 0.9}\n")
    line = ("--model", models / "plain", "--init-image", "start.png")
    assert generate(*line, "-c", "c.yaml") == 0
    assert generate(*line, "--strength", "0.9", out="two") == 0
    assert generate(*line, out="three") == 0
    assert np.array_equal(made(folder), made(folder, "two"))
    assert not np.array_equal(made(folder), made(folder, "three"))


def test_the_file_is_in_the_key_and_replay_makes_the_image_again(models, folder):
    line = ("--model", models / "plain", "--init-image", "start.png")
    assert generate(*line) == 0
    path = next((folder / "run").rglob("*.png"))
    assert main(["replay", str(path), "-o", "again.png", "-q"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), made(folder))
    picture(5, size=(48, 32)).save("start.png")
    assert generate(*line) == 4
    assert generate(*line, out="two") == 0
    keys = [json.loads((folder / run / "jobs.jsonl").read_text())["key"] for run in ("run", "two")]
    assert keys[0] != keys[1]


def test_the_bundled_model_serves_an_image_and_shares_its_components(folder):
    engine = sampler.load()
    hosted: Any = engine.as_hosted()
    hosted = hosted.serving(["image", "strength"])
    assert type(hosted.pipeline.pipe) is StableDiffusionImg2ImgPipeline
    assert hosted.pipeline.pipe.unet is engine.pipeline.pipe.unet
    assert generate("--init-image", "start.png", "--dry-run") == 0
    assert not (folder / "run").exists()


def test_a_strength_that_leaves_no_step_is_one_sentence(models, folder, capsys):
    line = ("--model", models / "plain", "--init-image", "start.png", "--strength", "0.1")
    assert generate(*line) == 3
    capsys.readouterr()
    assert main(["show", "run", "--errors"]) in (0, 3)
    assert "The strength leaves none of 5 steps; raise strength" in capsys.readouterr().out


def test_a_model_without_a_stock_call_refuses_the_image(folder, capsys):
    assert generate("--model", "bundled-flow", "--init-image", "start.png") == 2
    assert "load a pipeline without a student" in capsys.readouterr().err


WRONG = {
    "strength alone": (("--strength", "0.5"), "plain", "--strength needs --init-image FILE"),
    "mask alone": (("--mask", "mask.png"), "plain", "need --task"),
    "task": (("--init-image", "start.png", "--task", "deblur"), "plain", "without --task"),
    "image": (("--init-image", "start.png", "--image", "start.png"), "plain", "without --task"),
    "range": (("--init-image", "start.png", "--strength", "1.5"), "plain", "at most 1"),
    "not finite": (("--init-image", "start.png", "--strength", "nan"), "plain", "at most 1"),
    "missing": (("--init-image", "nowhere.png"), "plain", "nowhere.png: no such file"),
    "mask size": (
        ("--init-image", "start.png", "--mask", "small.png"),
        "plain",
        "--mask is 32 x 32 pixels, --init-image 48 x 32",
    ),
    "twice": (
        ("--init-image", "start.png", "--input", "image=mask.png"),
        "plain",
        "--input image and --init-image are the same",
    ),
    "no mask": (
        ("--init-image", "start.png"),
        "inpaint",
        "StableDiffusionInpaintPipeline needs the input 'mask_image'",
    ),
    "control image": (
        ("--init-image", "start.png"),
        "controlnet",
        "StableDiffusionControlNetImg2ImgPipeline needs the input 'control_image'",
    ),
    "size": (
        ("--init-image", "start.png", "--width", "64"),
        "plain",
        "StableDiffusionImg2ImgPipeline takes no width; its inputs decide the size",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_one_sentence(models, folder, capsys, name):
    options, model, words = WRONG[name]
    found = generate("--model", models / model, *options)
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (2, 1) and words in error
    assert not list((folder / "run").rglob("*.png"))
