"""Stock pipelines of `scripts/bench/hosting.py`, over the parts of the bundled model."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch

import sampler
from scripts.bench.overhead import bundled_pipeline, tiny_pipeline

SCALE, SIZE = 3.0, 64
PROMPTS = ["a red apple", "a blue car", "a green tree", "a white cat"]


@dataclass(frozen=True)
class Case:
    """A stock pipeline, and the further arguments of its call."""

    name: str
    pipe: Any
    inputs: dict[str, Any]

    @functools.cached_property
    def engine(self) -> Any:
        """The hosted engine over the pipeline."""
        return sampler.load(self.pipe).as_hosted()

    def stock(self, images: int, steps: int) -> Any:
        """Latents of one call of the pipeline by itself."""
        return self.pipe(
            PROMPTS[:images],
            num_inference_steps=steps,
            guidance_scale=SCALE,
            generator=[torch.Generator().manual_seed(k) for k in range(images)],
            output_type="latent",
            **self.inputs,
        ).images


def picture() -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def tiny() -> Case:
    return Case("tiny SD", tiny_pipeline(), {})


def controlnet() -> Case:
    """The network of the bundled model, with a ControlNet of its encoder."""
    diffusers: Any = importlib.import_module("diffusers")

    pipe = bundled_pipeline()
    factor = pipe.vae_scale_factor
    torch.manual_seed(0)
    channels = tuple(8 for _ in range(max(2, factor.bit_length())))
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=channels
    )
    made = diffusers.StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": control}, requires_safety_checker=False
    )
    return Case("ControlNet", made, {"image": picture()})


def inpainting() -> Case:
    """The network of the bundled model with the channels of a mask and of a masked image."""
    diffusers: Any = importlib.import_module("diffusers")
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from PIL import Image

    pipe = bundled_pipeline()
    latent = pipe.unet.config.in_channels
    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 2 * latent + 1})
    made = diffusers.StableDiffusionInpaintPipeline(
        **{**pipe.components, "unet": network}, requires_safety_checker=False
    )
    mask = Image.new("L", (SIZE, SIZE), 255)
    size = {"height": SIZE, "width": SIZE}
    return Case("inpainting", made, {"image": picture(), "mask_image": mask, **size})


def large() -> Case:
    """A network of a few hundred megabytes on a small latent."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    pipe = bundled_pipeline()
    count = len(pipe.unet.config.block_out_channels)
    wide = {**pipe.unet.config, "block_out_channels": (512,) * count, "norm_num_groups": 8}
    torch.manual_seed(0)
    network = UNet2DConditionModel.from_config(wide)
    parts = {**pipe.components, "unet": network}
    return Case("large SD", type(pipe)(**parts, requires_safety_checker=False), {})
