"""Four of diffusers' documented examples: unchanged but for our two lines, and as command lines.

Their text is that of the installed diffusers, with tiny models in the place of the Hub's, a CPU,
and smaller sizes. With `cfg` at the pipeline's own scale and its own method they make its images.
"""

import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.controlnet import pipeline_controlnet
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint as sdxl
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image, ImageSequence

import sampler
from sampler.cli import main
from tests import tiny
from tests.guidance.stock_hosted import (
    half_mask,
    image_to_video,
    picture,
    save_controlnet,
    save_ip_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore")
# The documentation's page on IP-Adapter (docs/source/en/using-diffusers/ip_adapter.md).
IP_ADAPTER = """
>>> import torch
>>> from diffusers import AutoPipelineForText2Image
>>> from diffusers.utils import load_image

>>> pipe = AutoPipelineForText2Image.from_pretrained(
...     "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16
... ).to("cuda")
>>> pipe.load_ip_adapter(
...     "h94/IP-Adapter", subfolder="sdxl_models", weight_name="ip-adapter_sdxl.bin"
... )
>>> pipe.set_ip_adapter_scale(0.6)

>>> image = load_image("https://huggingface.co/ip_adapter_diner.png")
>>> generator = torch.Generator(device="cpu").manual_seed(0)
>>> images = pipe(
...     prompt="a polar bear sitting in a chair drinking a milkshake",
...     ip_adapter_image=image,
...     negative_prompt="deformed, ugly, wrong proportion",
...     num_inference_steps=100,
...     generator=generator,
... ).images
"""
EVERYWHERE = {
    r"torch\.b?float16": "torch.float32",
    '"cuda"': '"cpu"',
    r"load_image\(\s*\"[^\"]*mask[^\"]*\"\s*\)|load_image\(mask_url\)": 'load_image("mask.png")',
    r"load_image\(\s*\"http[^\"]*\"\s*\)|load_image\(img_url\)": 'load_image("start.png")',
    r"num_inference_steps=\d+": "num_inference_steps=3",
    r".*enable_(xformers|model_cpu).*": "",  # no GPU here
    "variant=.*": "",
}
SD, XL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
WAN = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
EXAMPLES = {  # text, substitutions, method of the pipeline, its scale, our command line
    "ControlNet": (
        pipeline_controlnet.EXAMPLE_DOC_STRING,
        {SD: "sd", "lllyasviel/sd-controlnet-canny": "canny"},
        "unipc",
        7.5,
        ["futuristic-looking woman", "--model", "sd-unipc", "--controlnet", "canny",
         "--control-image", "edges.png"],
    ),
    "inpainting": (
        sdxl.EXAMPLE_DOC_STRING,
        {XL: "sdxl", "strength=0.80": "strength=0.80, generator=torch.manual_seed(0)"},
        "ddim",
        7.5,
        ["A majestic tiger sitting on a bench", "--model", "sdxl", "--init-image", "start.png",
         "--mask", "mask.png", "--strength", "0.8"],
    ),
    "IP-Adapter": (
        IP_ADAPTER,
        {XL: "sd", "h94/IP-Adapter": "adapters", "sdxl_models": "face",
         "ip-adapter_sdxl.bin": "ip-adapter.safetensors"},
        "ddim",
        7.5,
        ["a polar bear sitting in a chair drinking a milkshake", "--model", "sd", "--negative",
         "deformed, ugly, wrong proportion", "--ip-adapter", "adapters/face:0.6", "--ip-image",
         "start.png"],
    ),
    "image to video": (
        pipeline_wan_i2v.EXAMPLE_DOC_STRING,
        {WAN: "wan", r"480 \* 832": "16 * 16", "num_frames=81": "num_frames=5",
         "guidance_scale=5.0": "guidance_scale=5.0, num_inference_steps=3, "
         "generator=torch.manual_seed(0)", '"Bright tones[^"]*"': '"Bright tones"',
         '"An astronaut hatching[^)]*"': '"An astronaut"'},
        "ddim",
        5.0,
        ["An astronaut", "--negative", "Bright tones", "--model", "wan", "--input",
         "image=start.png", "--input", "num_frames=5"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    tiny.sd().save_pretrained(root / "sd")
    shutil.copytree(root / "sd", root / "sd-unipc")
    scheduler = UniPCMultistepScheduler.from_pretrained(root / "sd" / "scheduler")
    scheduler.save_pretrained(root / "sd-unipc" / "scheduler")  # as the example changes it
    index = root / "sd-unipc" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "UniPCMultistepScheduler"))
    tiny.sdxl().save_pretrained(root / "sdxl")
    image_to_video().save_pretrained(root / "wan")
    save_controlnet(root / "canny")
    (root / "adapters" / "face").mkdir(parents=True)
    save_ip_adapter(root / "adapters" / "face")
    return root


@pytest.fixture
def place(models, monkeypatch):
    """Run where the models are, with stand-ins for packages that the examples use."""
    monkeypatch.chdir(models)
    canny = lambda image, low, high: np.asarray(image)[..., 0]  # noqa: E731
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=canny))
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda *a, **k: None)
    fixed = SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", fixed, raising=False)
    return models


def code_of(name):
    """Program of an example with its substitutions."""
    text, changes, *_ = EXAMPLES[name]
    lines = [line.strip() for line in text.splitlines()]
    code = "\n".join(line[4:] for line in lines if line[:3] in (">>>", "..."))
    for old, new in {**changes, **EVERYWHERE}.items():
        code, count = re.subn(old, new, code)
        assert count or old in EVERYWHERE, old
    return code


def with_our_lines(code, method, rule):
    """The program with a sampler as its scheduler and its call inside of `sampler.guide`."""
    (call,) = [s for s in ast.parse(code).body if re.match(r"\w+ = pipe\(", ast.unparse(s))]
    lines = code.splitlines()
    before, own, after = (
        lines[: call.lineno - 1], lines[call.lineno - 1 : call.end_lineno], lines[call.end_lineno :]
    )  # fmt: skip
    two = [f"pipe.scheduler = sampler.scheduler({method!r}, pipe.scheduler)",
           f"with sampler.guide(pipe, {rule!r}) as calls:"]  # fmt: skip
    return "\n".join([*before, *two, textwrap.indent("\n".join(own), "    "), *after])


def run(code):
    """(images or frames as numbers of 0 to 255, the program's names)."""
    names = {"sampler": sampler}
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), names)
    made = names.get("output", names.get("images", names.get("image")))
    made = made if isinstance(made, (list, np.ndarray)) else [made]
    frames = [np.asarray(one, dtype=np.float64) for one in made]
    return [one if isinstance(made, list) else 255 * one for one in frames], names


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_lines_in_the_example_and_one_command_line(name, place, tmp_path):
    _, _, method, scale, line = EXAMPLES[name]
    width, height = (16, 16) if name == "image to video" else (32, 32)
    picture(size=(width, height)).save("start.png")
    half_mask((width, height)).save("mask.png")
    edges = np.asarray(picture(size=(width, height)))[..., 0]
    Image.fromarray(np.stack([edges] * 3, -1)).save("edges.png")
    code = code_of(name)
    plain, _ = run(code)
    same, names = run(with_our_lines(code, method, {"name": "cfg", "scale": scale}))
    close = 0.02 if name == "image to video" else 1  # the others are rounded
    assert np.abs(np.stack(same) - np.stack(plain)).max() <= close
    assert names["calls"].nfe == [2 * (2 if name == "inpainting" else 3)]
    other, _ = run(with_our_lines(code, "dpmpp_2m", {"name": "apg", "scale": 2 * scale}))
    assert np.abs(np.stack(other) - np.stack(plain)).max() > 5 * close

    size = ["--width", str(plain[0].shape[1]), "--height", str(plain[0].shape[0])]
    shared = ["--seed", 0, "--steps", 3, "--sampler", method, "--guidance", "cfg", "--scale", scale]
    out = ["--device", "cpu", "-q", "-o", tmp_path / "run", *size]
    assert main(["generate", *map(str, [*line, *shared, *out])]) == 0
    (path,) = (Path(tmp_path) / "run" / "images").iterdir()
    with Image.open(path) as file:
        stored = [np.asarray(f.convert("RGB"), float) for f in ImageSequence.Iterator(file)]
    assert np.abs(np.stack(stored) - np.stack(plain)).max() <= close + 0.5
