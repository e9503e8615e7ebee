"""`--controlnet` and `--ip-adapter`: the stock classes with them, on the command line."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import sampler
from sampler.cli import main
from tests import tiny
from tests.guidance.stock_hosted import half_mask, picture, save_controlnet, save_ip_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (48, 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    tiny.sd().save_pretrained(root / "sd")
    for seed, name in enumerate(("canny", "depth")):
        save_controlnet(root / name, seed=seed)
    for seed, name in enumerate(("face", "style")):
        (root / name).mkdir()
        save_ip_adapter(root / name, seed=seed)
    for name, value in (("first", 1), ("second", 2)):
        picture(value, size=SIZE).save(root / f"{name}.png")
    half_mask(SIZE).save(root / "mask.png")
    return root


@pytest.fixture
def line(models, tmp_path, monkeypatch):
    """Run `generate` in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def generate(*args, out="run"):
        own = ["a fox", "--model", models / "sd", "--seed", 3, "--steps", 3, "--scale", 4, "-q"]
        return main(["generate", *map(str, [*own, *args, "--device", "cpu", "-o", out])])

    return generate


def made(folder, out="run"):
    paths = sorted((folder / out).rglob("*.png"))
    return [np.asarray(Image.open(path), dtype=int) for path in paths]


def stock(cls, prepare=lambda pipe: None, controlnet=(), **inputs):
    more = {} if not controlnet else {"controlnet": [*controlnet]}
    if len(controlnet) == 1:
        more = {"controlnet": controlnet[0]}
    pipe = cls(**tiny.sd().components, **more, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    seed = torch.Generator().manual_seed(3)
    found = pipe("a fox", num_inference_steps=3, guidance_scale=4, generator=seed, **inputs)
    return np.asarray(found.images[0], dtype=int)


def opened(models, name):
    return Image.open(models / f"{name}.png").convert("RGB")


def test_a_controlnet_is_the_stock_class_at_the_size_of_its_image(models, line, tmp_path):
    given = ("--controlnet", models / "canny", "--control-image", models / "first.png")
    assert line(*given, "--control-scale", "0.7") == 0
    wanted = stock(
        StableDiffusionControlNetPipeline,
        controlnet=[ControlNetModel.from_pretrained(models / "canny")],
        image=opened(models, "first"),
        controlnet_conditioning_scale=0.7,
    )
    (image,) = made(tmp_path)
    assert image.shape == wanted.shape == (32, 48, 3) and np.abs(image - wanted).max() <= 1
    (path,) = (tmp_path / "run").rglob("*.png")
    assert main(["replay", str(path), "-o", "again.png", "-q"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), image)


def test_several_controlnets_have_an_image_and_a_scale_each(models, line, tmp_path):
    given = [word for name, scale, image in (("canny", 0.5, "first"), ("depth", 1.5, "second"))
             for word in ("--controlnet", models / name, "--control-scale", scale,
                          "--control-image", models / f"{image}.png")]  # fmt: skip
    assert line(*given) == 0
    wanted = stock(
        StableDiffusionControlNetPipeline,
        controlnet=[ControlNetModel.from_pretrained(models / name) for name in ("canny", "depth")],
        image=[opened(models, name) for name in ("first", "second")],
        controlnet_conditioning_scale=[0.5, 1.5],
    )
    assert np.abs(made(tmp_path)[0] - wanted).max() <= 1


def test_a_controlnet_beside_a_start_image(models, line, tmp_path):
    given = ("--controlnet", models / "canny", "--control-image", models / "first.png")
    assert line(*given, "--init-image", models / "second.png", "--strength", "0.7") == 0
    wanted = stock(
        StableDiffusionControlNetImg2ImgPipeline,
        controlnet=[ControlNetModel.from_pretrained(models / "canny")],
        image=opened(models, "second"),
        control_image=opened(models, "first"),
        strength=0.7,
        height=32,
        width=48,
    )
    assert np.abs(made(tmp_path)[0] - wanted).max() <= 1


def test_an_ip_adapter_is_that_of_the_stock_pipeline(models, line, tmp_path):
    given = ("--ip-adapter", f"{models / 'face'}:0.6", "--ip-image", models / "first.png")
    size = ("--width", 32, "--height", 32)
    assert line(*given, *size) == 0

    def load(pipe):
        pipe.load_ip_adapter(
            str(models / "face"), subfolder="", weight_name="ip-adapter.safetensors"
        )
        pipe.set_ip_adapter_scale(0.6)

    image = opened(models, "first")
    wanted = stock(StableDiffusionPipeline, load, ip_adapter_image=image, height=32, width=32)
    (found,) = made(tmp_path)
    assert np.abs(found - wanted).max() <= 1
    without = stock(StableDiffusionPipeline, height=32, width=32)
    assert np.abs(found - without).max() > 10
    (path,) = (tmp_path / "run").rglob("*.png")
    assert main(["replay", str(path), "-o", "again.png", "-q"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), found)


def key(folder, out):
    return json.loads((folder / out / "jobs.jsonl").read_text().splitlines()[0])["key"]


def test_weights_and_scale_of_an_adapter_are_in_the_key(models, line, tmp_path):
    image = ("--ip-image", models / "first.png", "--width", 32, "--height", 32)
    control = ("--control-image", models / "first.png", "--controlnet")
    cases = {
        "a": (*image, "--ip-adapter", models / "face"),
        "b": (*image, "--ip-adapter", models / "style"),
        "c": (*image, "--ip-adapter", f"{models / 'face'}:0.5"),
        "d": (*control, models / "canny"),
        "e": (*control, models / "depth"),
    }
    for name, given in cases.items():
        assert line(*given, out=name) == 0
    pixels = [made(tmp_path, name)[0] for name in cases]
    assert len({key(tmp_path, name) for name in cases}) == len(cases)
    for group in (pixels[:3], pixels[3:]):
        assert all(not np.array_equal(group[0], other) for other in group[1:])


def test_an_axis_a_table_and_a_configuration_take_them(models, line, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"model: {{controlnet: ['{models / 'canny'}']}}\n"
        f"inputs: {{control_image: {models / 'first.png'}}}\n"
    )
    axis = f"input.control_image={models / 'first.png'},{models / 'second.png'}"
    assert line("-c", "c.yaml", out="one") == 0
    assert line("-c", "c.yaml", "--axis", axis, out="two") == 0
    one, (first, second) = made(tmp_path, "one")[0], made(tmp_path, "two")
    assert np.array_equal(one, first) and not np.array_equal(first, second)
    rows = [("a fox", models / "second.png")]
    table = "prompt,input.control_image\n" + "\n".join(f"{a},{b}" for a, b in rows)
    (tmp_path / "t.csv").write_text(table)
    tree = ["generate", "--prompts", "t.csv", "--model", str(models / "sd"), "-q", "-o", "three"]
    tree += ["--seed", "3", "--steps", "3", "--scale", "4", "--device", "cpu"]
    assert main([*tree, "--controlnet", str(models / "canny")]) == 0
    assert np.array_equal(made(tmp_path, "three")[0], second)


def test_the_same_from_python(models, tmp_path):
    engine = sampler.load(
        models / "sd", device="cpu", controlnet=[models / "canny", models / "depth"],
        ip_adapter={models / "face": 0.5, models / "style": 1.0},
    )  # fmt: skip
    images = [picture(1), picture(2)]
    given = {"control_image": images, "ip_adapter_image": images}
    settings = {"seeds": 1, "steps": 2, "output": "latent", "height": 32, "width": 32}
    one = engine.generate("a fox", inputs=given, **settings).latents
    both = engine.generate(
        ["a fox", "a hen"], inputs={name: [images, images] for name in given}, **settings
    ).latents
    assert engine.hosted and (both[:1] - one).abs().max() <= 1e-5 * one.abs().max()
    with pytest.raises(ValueError, match="one list per prompt"):
        engine.generate(["a fox", "a hen"], inputs=given, **settings)
    with pytest.raises(ValueError, match=r"needs an image: give the input 'ip_adapter_image'"):
        engine.generate("a fox", inputs={"control_image": images}, **settings)
    for name in ("controlnet", "ip_adapter"):
        with pytest.raises(ValueError, match=f"{name} has no effect on a pipeline that is loaded"):
            sampler.load(tiny.sd(), **{name: models / "canny"})
        with pytest.raises(ValueError, match=f"{name} does not work with bundled-flow"):
            sampler.load("bundled-flow", **{name: models / "canny"})


@pytest.fixture(scope="module")
def broken(models):
    tensors = load_file(models / "face" / "ip-adapter.safetensors")
    half = {name: t for name, t in tensors.items() if not name.startswith("ip_adapter.1.")}
    wide = {
        **tensors,
        "image_proj.proj.weight": torch.zeros(len(tensors["image_proj.norm.bias"]) * 4, 20),
    }
    files = {
        "half": half,
        "wide": wide,
        "odd": {**tensors, "extra.weight": torch.zeros(1)},
        "lora": {"lora.weight": torch.zeros(1)},
        "id": {
            "ip_adapter.1.to_k_ip.weight": torch.zeros(1),
            "image_proj.norm.weight": torch.zeros(1),
        },
    }
    for name, content in files.items():
        save_file(content, models / "face" / f"{name}.safetensors")
    yield
    for name in files:
        (models / "face" / f"{name}.safetensors").unlink()


CONTROL = ("--controlnet", "{}/canny", "--control-image", "{}/first.png")
WRONG = {
    "no control image": (CONTROL[:2], 2, "needs the input 'image'"),
    "no controlnet": (CONTROL[2:], 2, "has no argument 'control_image'"),
    "no ip image": (("--ip-adapter", "{}/face/ip-adapter.safetensors"), 2, "give the input"),
    "no ip adapter": (("--ip-image", "{}/first.png"), 2, "needs an IP-Adapter: load the model"),
    "missing image": ((*CONTROL[:3], "nowhere.png"), 2, "nowhere.png: no such file"),
    "missing folder": (("--controlnet", "nowhere", *CONTROL[2:]), 6, "nowhere does not exist"),
    "no ControlNet": (("--controlnet", "{}/sd/unet", *CONTROL[2:]), 6, "is not a ControlNet"),
    "scale": ((*CONTROL, "--control-scale", "-1"), 2, "must be a number of 0 or more"),
    "weight": (("--ip-adapter", "{}/face:nan"), 2, "An IP-Adapter is PATH or PATH:weight"),
    "student": ((*CONTROL, "--weak", "{}/sd/unet"), 2, "weak has no effect on"),
    "several": (("--ip-adapter", "{}/face"), 6, "holds 6 safetensors files; name the file"),
    "other network": (("--ip-adapter", "{}/face/half.safetensors"), 6, "of another network"),
    "no encoder": (("--ip-adapter", "{}/face/wide.safetensors"), 6, "whose projection_dim is 20"),
    "foreign tensor": (
        ("--ip-adapter", "{}/face/odd.safetensors"),
        6,
        "is not a tensor of an IP-Adapter",
    ),
    "a LoRA": (("--ip-adapter", "{}/face/lora.safetensors"), 6, "is not an IP-Adapter"),
    "for faces": (("--ip-adapter", "{}/face/id.safetensors"), 6, "(FaceID)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_one_sentence(models, line, tmp_path, capsys, broken, name):
    options, code, words = WRONG[name]
    given = [option.format(models) for option in options]
    if options[0] == "--ip-adapter" and name != "no ip image":
        given += ["--ip-image", str(models / "first.png")]
    found = line(*given)
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (code, 1) and words in error
    assert not list(tmp_path.rglob("*.png"))
