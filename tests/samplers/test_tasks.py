"""Restoring an image file: the command line's --task, and RED-Diff through a decoder."""

import json

import pytest
import torch
from PIL import Image

import sampler
from sampler.cli import main
from sampler.core import images
from sampler.samplers.methods import Problem, strategies
from tests import tiny


def write(path, size=(64, 64), colour=(200, 40, 40)):
    Image.new("RGB", size, colour).save(path)
    return str(path)


def spec_of(operator, y):
    return strategies("reddiff", Problem(operator, y))[1]


def test_restored_images_fit_the_measurement(tmp_path):
    """Through the bundled decoder: the result's 4 x 4 means come nearer to y than the start's."""
    small = Image.open("configs/images/apple_small.png")
    small.save(tmp_path / "small.png")
    engine = sampler.load()
    spec = spec_of({"name": "superres"}, str(tmp_path / "small.png"))
    options = {"seeds": [1], "guidance": "none", "output": "tensor"}
    result = engine.generate("a red apple on a blue background", sampler=spec, steps=40, **options)
    y = images.read(tmp_path / "small.png")
    truth = images.read("configs/images/apple.png")
    gap = torch.nn.functional.avg_pool2d(result.images, 4) - y
    start = y.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert gap.abs().mean() < 0.05
    assert (result.images - truth).square().mean() < (start - truth).square().mean()
    assert json.loads(json.dumps(result.config))["sampler"] == result.config["sampler"]
    assert torch.equal(engine.generate(**result.config).images, result.images)
    assert result.nfe == [40]


def test_the_command_line(tmp_path, capsys):
    picture, mask = write(tmp_path / "in.png"), str(tmp_path / "mask.png")
    Image.new("L", (64, 64), 255).save(mask)
    common = ["generate", "a dog", "--steps", "3", "-q"]
    for task, extra in (
        ("inpaint", ["--mask", mask]),
        ("deblur", ["--set", "sampler.lr=0.1"]),
        ("superres", []),
    ):
        image = write(tmp_path / "small.png", (16, 16)) if task == "superres" else picture
        out = tmp_path / task
        code = main([*common, "--task", task, "--image", image, *extra, "-o", str(out)])
        assert code == 0, capsys.readouterr().err
        (file,) = (out / "images").iterdir()
        assert Image.open(file).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--task", "inpaint"], "needs --image"),
        (["--task", "inpaint", "--image", "in.png"], "--mask FILE goes with"),
        (["--task", "deblur", "--image", "in.png", "--mask", "mask.png"], "--mask FILE goes with"),
        (["--task", "inpaint", "--image", "in.png", "--mask", "small.png"], "--mask is 16 x 16"),
        (["--task", "deblur", "--image", "none.png"], "none.png"),
        (["--task", "paint", "--image", "in.png"], "is not one of"),
        (["--image", "in.png"], "need --task"),
    ],
)
def test_bad_tasks(arguments, part, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("in.png")
    write("mask.png")
    write("small.png", (16, 16))
    assert main(["generate", "a dog", *arguments, "-o", "out"]) == 2
    assert part in capsys.readouterr().err


def test_an_image_of_another_size_is_refused(tmp_path):
    spec = spec_of("denoise", write(tmp_path / "in.png", (32, 32)))
    with pytest.raises(ValueError, match="give width=32, height=32"):
        sampler.load(tiny.sd()).generate("a", sampler=spec, steps=2, height=32, width=48)
