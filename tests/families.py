"""Every family of pipelines that is served: a tiny one, how the stock pipeline is called, and what
does not work with it.

`FAMILIES` is what the tests of `tests/pipelines/test_families.py` run over, and what
`docs/families.md` is written from (`python -m tests.families`): a capability without a reason in
`refused` is tested to work, one with a reason is tested to be refused with it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import sampler
from sampler.core.noise import Noise
from tests import tiny
from tests import tiny_transformers as tiny2

SEEDS = (7, 8)
NO_BINS = {"use_resolution_binning": False}
NEGATIVE = ("blurry", "a dog")
CAPABILITIES = {
    "scheduler": "drop-in scheduler",
    "hook": "hook",
    "finetune": "fine-tuning",
    "reddiff": "RED-Diff",
}


def same(latents):
    return latents


def tokens(latents):
    """[B, C, h, w] as the stock Flux pipeline gives it: a row per 2 x 2 patch."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


@dataclass(frozen=True)
class Family:
    """One family.

    classes: the pipeline classes; build: a fresh tiny pipeline. call: further arguments of the
    stock call; prompts; scale: the stock argument and what ours is larger by; latents: ours in the
    stock layout, or None where the stock pipeline gives images only. exact: whether guided latents
    are equal to the bit (the stock pipeline makes the same network calls), or to 1e-5. sampler:
    what the stock scheduler does; noise: the module whose random numbers it takes. refused:
    {capability: words of the reason}.
    """

    name: str
    classes: tuple[str, ...]
    build: Callable[..., Any]
    call: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (32, 64)
    prompts: tuple[Any, ...] = ("a red fox", "two green apples")
    scale: tuple[str | None, float] = ("guidance_scale", 0.0)
    negative: bool = True
    latents: Callable[[torch.Tensor], torch.Tensor] | None = same
    exact: bool = True
    sampler: Any = "ddim"
    noise: str | None = None
    network: str = "transformer"
    frames: int | None = None
    steps: int = 4
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        return self.scale[0] is not None

    def engine(self, pipe: Any) -> Any:
        """An engine with the stock defaults."""
        engine = sampler.load(pipe)
        if self.frames is not None:
            engine.pipeline.frames = self.frames
        return engine

    def rule(self, engine: Any, scale: float) -> dict[str, Any]:
        """The stock pipeline's guidance at a scale in our convention."""
        if not self.guided:
            return {"name": "none"}
        own = engine.pipeline.default_guidance
        return {**(own if own["name"] == "cfg" else {"name": "cfg"}), "scale": scale}

    def stock(self, pipe, scale=3.0, output="latent", rows=(0, 1), copied=True):
        """Run the stock pipeline on some of the prompts: latents, or images for "pt".

        copied: of a copy of it, since the call leaves traces (its scale, its scheduler).
        """
        options = dict(self.call)
        if self.scale[0] is not None:
            options[self.scale[0]] = scale - self.scale[1]
        if self.negative and self.guided:
            options["negative_prompt"] = [NEGATIVE[i] for i in rows]
        options.update(self.call_prompts(rows))
        if self.latents is None:
            output = "pt"
        if "height" in inspect.signature(type(pipe).__call__).parameters:
            options["height"], options["width"] = self.size
        seeds = [SEEDS[i] for i in rows]
        with self.same_noise(seeds):
            made = (copy.deepcopy(pipe) if copied else pipe)(
                num_inference_steps=self.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type=output,
                **options,
            )
        if self.frames is None:
            return made.images
        return made.frames.transpose(1, 2) if output == "pt" else made.frames

    def call_prompts(self, rows: Any) -> dict[str, Any]:
        given = [self.prompts[i] for i in rows]
        if self.prompts[0] == "":
            return {"batch_size": len(rows)}
        if isinstance(given[0], str):
            return {"prompt": given}
        return {"class_labels": given, **({} if self.guided else {"batch_size": len(rows)})}

    def ours(
        self, engine: Any, scale: float = 3.0, output: str = "latent", rows: Any = (0, 1), **o
    ):
        """The same by the engine; a Result."""
        rule = o.pop("guidance", None) or self.rule(engine, scale)
        if self.negative and self.guided:
            o.setdefault("negative", [NEGATIVE[i] for i in rows])
        options = {"sampler": self.sampler, "steps": self.steps, **o}
        return engine.generate(
            [self.prompts[i] for i in rows],
            seeds=[SEEDS[i] for i in rows],
            guidance=rule,
            height=self.size[0],
            width=self.size[1],
            output="tensor" if output == "pt" else output,
            **options,
        )

    def compared(self, result: Any, engine: Any) -> torch.Tensor:
        """A result's latents in the stock pipeline's form."""
        if self.latents is None:
            return engine.pipeline.decode(result.latents)
        return self.latents(result.latents)

    @contextlib.contextmanager
    def same_noise(self, seeds):
        """Inside, a stochastic stock scheduler draws the engine's noise."""
        if self.noise is None:
            yield
            return
        count = iter(range(1000))

        def draw(shape, **_):
            return Noise(tuple(seeds)).draw(next(count), torch.empty(shape))

        with mock.patch.object(importlib.import_module(self.noise), "randn_tensor", draw):
            yield


UNET = {"network": "unet"}
PIXELS = {
    "network": "unet",
    "size": (16, 16),
    "prompts": ("", ""),
    "scale": (None, 0.0),
    "negative": False,
    "latents": None,
}
VIDEOS = {"finetune": "this pipeline generates videos", "reddiff": "this pipeline generates videos"}
NO_BRANCH = "it has no unconditional branch"
FAMILIES = {
    family.name: family
    for family in (
        Family("Stable Diffusion 1.x", ("StableDiffusionPipeline",), tiny.sd, **UNET),
        Family(
            "Stable Diffusion 2.x (v)",
            ("StableDiffusionPipeline",),
            lambda: tiny.sd("zero_snr"),
            **UNET,
        ),
        Family("Stable Diffusion XL", ("StableDiffusionXLPipeline",), tiny.sdxl, **UNET),
        Family("Kolors", ("KolorsPipeline",), tiny2.kolors, **UNET),
        Family(
            "PixArt-alpha",
            ("PixArtAlphaPipeline",),
            tiny.pixart_alpha,
            {**NO_BINS, "clean_caption": False},
        ),
        Family(
            "PixArt-Sigma",
            ("PixArtSigmaPipeline",),
            tiny.pixart,
            {**NO_BINS, "clean_caption": False},
        ),
        Family("HunyuanDiT", ("HunyuanDiTPipeline",), tiny2.hunyuan_dit, NO_BINS),
        Family("Stable Diffusion 3", ("StableDiffusion3Pipeline",), tiny.sd3),
        Family(
            "Flux",
            ("FluxPipeline",),
            tiny.flux,
            scale=("true_cfg_scale", 0.0),
            latents=tokens,
            exact=False,
        ),
        Family(
            "Flux (guidance embedding)",
            ("FluxPipeline",),
            lambda: tiny.flux(True),
            scale=("true_cfg_scale", 0.0),
            latents=tokens,
            exact=False,
        ),
        Family(
            "Flux 2",
            ("Flux2Pipeline",),
            tiny2.flux2,
            scale=(None, 0.0),
            latents=lambda x: x.flatten(2).transpose(1, 2),
            refused={"hook": NO_BRANCH},
        ),
        Family(
            "Flux 2 Klein",
            ("Flux2KleinPipeline",),
            tiny2.klein,
            negative=False,
            latents=None,
            exact=False,
        ),
        Family(
            "Qwen-Image",
            ("QwenImagePipeline",),
            tiny2.qwen_image,
            scale=("true_cfg_scale", 0.0),
            latents=lambda x: tokens(x.flatten(4, 5).flatten(2, 3)),
            exact=False,
        ),
        Family("AuraFlow", ("AuraFlowPipeline",), tiny2.aura_flow),
        Family("Sana", ("SanaPipeline",), tiny2.sana, NO_BINS),
        Family("Lumina 2", ("Lumina2Pipeline",), tiny2.lumina2, exact=False),
        Family(
            "Z-Image",
            ("ZImagePipeline",),
            tiny2.z_image,
            scale=("guidance_scale", 1.0),
            exact=False,
        ),
        Family(
            "DiT",
            ("DiTPipeline",),
            tiny.dit,
            size=(32, 32),
            prompts=(3, 700),
            negative=False,
            latents=None,
            exact=False,
            steps=5,
        ),
        Family(
            "DDIM, unconditional",
            ("DDIMPipeline",),
            tiny2.ddim,
            **PIXELS,
            refused={"hook": NO_BRANCH},
        ),
        Family(
            "DDPM, unconditional",
            ("DDPMPipeline",),
            tiny2.ddpm,
            **PIXELS,
            exact=False,
            sampler={"name": "ddim", "eta": 1.0},
            noise="diffusers.schedulers.scheduling_ddpm",
            steps=5,
            refused={"hook": NO_BRANCH},
        ),
        Family(
            "Consistency model",
            ("ConsistencyModelPipeline",),
            tiny2.consistency,
            **{**PIXELS, "prompts": (3, 7)},
            exact=False,
            sampler="consistency",
            noise="diffusers.schedulers.scheduling_consistency_models",
            steps=3,
            refused={"hook": NO_BRANCH},
        ),
        Family(
            "Latent consistency model",
            ("LatentConsistencyModelPipeline",),
            tiny2.lcm,
            **UNET,
            scale=(None, 0.0),
            exact=False,
            sampler="consistency",
            noise="diffusers.schedulers.scheduling_lcm",
            refused={"hook": NO_BRANCH},
        ),
        Family(
            "Wan (text to video)",
            ("WanPipeline",),
            tiny2.wan,
            {"num_frames": 5},
            size=(32, 48),
            frames=5,
            exact=False,
            refused=VIDEOS,
        ),
        Family(
            "Wan with two networks",
            ("WanPipeline",),
            lambda: tiny2.wan(boundary=0.6),
            {"num_frames": 5},
            size=(32, 48),
            frames=5,
            exact=False,
            refused=VIDEOS,
        ),
    )
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "families.md"


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


HEAD = """# Families of pipelines

<!-- written by `python -m tests.families`; a test compares the two -->

Supported pipelines and features. Every cell is a test on a tiny random pipeline
(`pytest tests/pipelines/test_families.py`) against the installed diffusers, on the CPU in float32.
"yes" means that it works; anything else is the reason with which it is refused.

- **engine**: guided latents against the stock pipeline's own call with the same seeds, prompts and
  negative prompts. *To the bit* if the stock pipeline makes the same calls; otherwise within
  1e-5 of the largest value, since some make two calls where the engine makes one. Stochastic stock
  schedulers receive the engine's noise. The same holds without guidance and for decoded images. In
  every family a sample of a batch equals a single run, runs can start from images, and gradients
  reach the network.
- **drop-in scheduler**: `sampler.scheduler(...)` in the stock pipeline gives the engine's latents.
- **hook**: `sampler.guide(...)` around the stock pipeline gives the engine's latents.
- **fine-tuning**: AlignProp trains a LoRA and leaves the base weights unchanged.
- **RED-Diff**: an image is restored from a measurement.

"""


NOTES = """
## Notes on families

- **Flux, Flux 2, Qwen-Image with a guidance embedding**: the rule `embedded` passes the scale to
  the network and is the default; `cfg` is the stock pipelines' "true" CFG, on top of it.
- **Z-Image**: the stock `guidance_scale` equals our scale minus one.
- **Qwen-Image, Lumina 2**: the default `cfg` sets `match_norm`, as stock does. Qwen-Image's
  latents are [C, h/2, 2, w/2, 2], so that a rule can measure norms per token.
- **DiT, consistency models with classes**: a prompt is a class index, or a label of the
  pipeline. **Unconditional models**: the prompt is `""`.
- **Wan**: `engine.pipeline.frames` is the number of frames (stock default 81); images are lists of
  frames, or [B, 3, F, H, W]. Run folders keep images only.
- **PixArt, Sana, HunyuanDiT**: images have the requested size; sizes are not binned.
- **SD 3.5**: skip-layer guidance is not supported, and refused by the hook.
- Safety checkers, watermarks, reference images, IP-Adapters and prompt rewriting are not supported.
"""


def table():
    """The document, from what the tests run over."""
    rows = [
        ["family", "pipeline class", "engine", *CAPABILITIES.values()],
        ["---"] * (3 + len(CAPABILITIES)),
    ]
    for family in FAMILIES.values():
        classes = ", ".join(f"`{name}`" for name in family.classes)
        parity = "to the bit" if family.exact else "1e-5"
        cells = [family.refused.get(name, "yes") for name in CAPABILITIES]
        rows.append([family.name, classes, parity, *cells])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + NOTES


if __name__ == "__main__":
    DOCUMENT.write_text(table(), encoding="utf-8")
