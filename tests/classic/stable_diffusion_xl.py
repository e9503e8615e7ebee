"""Classes over the parts of Stable Diffusion XL and Kolors."""

from __future__ import annotations

from typing import Any

import diffusers

from tests import tiny, tiny_transformers
from tests.classic.parts import WIDTH
from tests.classic.recipe import Recipe

CLIPS = 2 * WIDTH  # both encoders


def unet(channels: int = 4, **options: Any) -> Any:
    config = {**tiny.unet_config(CLIPS), **tiny.TEXT_TIME, "in_channels": channels, **options}
    return diffusers.UNet2DConditionModel(**config)


def sdxl(channels: int = 4, **more: Any) -> dict[str, Any]:
    parts = {**tiny.sdxl().components, **more}
    if channels != 4:
        parts["unet"] = unet(channels)
    return parts


def control(union: bool = False) -> dict[str, Any]:
    parts = sdxl()
    if not union:
        network = diffusers.ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(4, 4)
        )
        return {**parts, "controlnet": network}
    config = {**tiny.unet_config(CLIPS), **tiny.TEXT_TIME}
    for name in ("sample_size", "up_block_types"):
        del config[name]
    network = diffusers.ControlNetUnionModel(
        **config, conditioning_embedding_out_channels=(4, 4), num_trans_channel=16,
        num_trans_head=2, num_proj_channel=16,
    )  # fmt: skip
    return {**parts, "controlnet": network}


def control_xs() -> dict[str, Any]:
    parts = sdxl(unet=unet(use_linear_projection=True, layers_per_block=2))
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        parts["unet"], size_ratio=1, conditioning_embedding_out_channels=(4, 4)
    )
    return {**parts, "controlnet": adapter}


def adapter() -> dict[str, Any]:
    found = diffusers.T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2
    )
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    network = unet(down_block_types=down, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return sdxl(adapter=found, unet=network)


def kolors() -> dict[str, Any]:
    return tiny_transformers.kolors().components


UNION = {"control_mode": 1, "control_image": None}
TINY = {
    "StableDiffusionXLPipeline": Recipe(sdxl),
    "StableDiffusionXLImg2ImgPipeline": Recipe(sdxl),
    "StableDiffusionXLInpaintPipeline": Recipe(sdxl),
    "StableDiffusionXLInstructPix2PixPipeline": Recipe(lambda: sdxl(8)),
    "StableDiffusionXLPAGPipeline": Recipe(sdxl),
    "StableDiffusionXLPAGImg2ImgPipeline": Recipe(sdxl),
    "StableDiffusionXLPAGInpaintPipeline": Recipe(sdxl),
    "StableDiffusionXLControlNetPipeline": Recipe(control),
    "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(control),
    "StableDiffusionXLControlNetInpaintPipeline": Recipe(control),
    "StableDiffusionXLControlNetPAGPipeline": Recipe(control),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Recipe(control),
    "StableDiffusionXLControlNetUnionPipeline": Recipe(lambda: control(True), {"control_mode": 1}),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(
        lambda: control(True), {"control_mode": 1}
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(
        lambda: control(True), {"control_mode": 1}
    ),
    "StableDiffusionXLControlNetXSPipeline": Recipe(control_xs),
    "StableDiffusionXLAdapterPipeline": Recipe(adapter),
    "TextToVideoZeroSDXLPipeline": Recipe(sdxl, {"video_length": 2, "t0": 1, "t1": 2}),
    "KolorsPipeline": Recipe(kolors),
    "KolorsImg2ImgPipeline": Recipe(kolors),
    "KolorsPAGPipeline": Recipe(kolors),
}
