"""Classes over the parts of Flux, Flux 2 and Stable Diffusion 3, and their relatives."""

from __future__ import annotations

from typing import Any

import diffusers

from tests import tiny, tiny_transformers
from tests.classic.parts import small, t5
from tests.classic.recipe import Recipe
from tests.guidance.stock_hosted import picture

PACKED = {"patch_size": 1, "in_channels": 16, "axes_dims_rope": (4, 4, 8)}


def flux(channels: int = 16, **more: Any) -> dict[str, Any]:
    """`channels` that enter the network of packed latents; 16 leave it."""
    own = {**PACKED, "in_channels": channels, "out_channels": 16}
    network = small("FluxTransformer2DModel", **own, guidance_embeds=True)
    return {**tiny.flux().components, "transformer": network, "image_encoder": None, **more}


def flux_control() -> dict[str, Any]:
    return flux(controlnet=small("FluxControlNetModel", **PACKED))


def sd3(channels: int = 4) -> dict[str, Any]:
    """`channels` of the latents."""
    parts = {**tiny.sd3().components, "image_encoder": None}
    if channels != 4:
        own = {**parts["transformer"].config, "in_channels": channels, "out_channels": channels}
        parts["transformer"] = diffusers.SD3Transformer2DModel.from_config(own)
        parts["vae"] = tiny.flow_vae(channels)
    return parts


def sd3_control(extra: int = 0) -> dict[str, Any]:
    parts = sd3()
    network = diffusers.SD3ControlNetModel.from_transformer(
        parts["transformer"],
        num_extra_conditioning_channels=extra,
        load_weights_from_transformer=False,
    )
    return {**parts, "controlnet": network}


def chroma() -> dict[str, Any]:
    network = small(
        "ChromaTransformer2DModel", **PACKED, out_channels=16, approximator_num_channels=16,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {**t5(), "transformer": network, "vae": tiny.flow_vae(4), "scheduler": scheduler}


def bria() -> dict[str, Any]:
    network = small("BriaTransformer2DModel", **PACKED, pooled_projection_dim=None)
    return {**chroma(), **t5(128), "transformer": network}


def visual_cloze() -> dict[str, Any]:
    return {**flux(16 + 16 + 16), "resolution": 32}


def klein(distilled: bool = False) -> dict[str, Any]:
    return {**tiny_transformers.klein().components, "is_distilled": distilled}


def ovis() -> dict[str, Any]:
    from tests.tiny_transformers import Qwen3Config, Qwen3Model, language, qwen_tokenizer

    tokenizer = qwen_tokenizer()
    network = small(
        "OvisImageTransformer2DModel", **PACKED, out_channels=16, joint_attention_dim=16
    )
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": tiny.flow_vae(4),
        "text_encoder": Qwen3Model(language(Qwen3Config, tokenizer)),
        "tokenizer": tokenizer,
        "transformer": network,
    }


LARGER = {"image": picture(1, (64, 64))}
GRID = [[picture(1), picture(2)], [picture(3), None]]
KONTEXT = {"_auto_resize": False, "max_area": 32 * 32}
CLOZE = {"task_prompt": "a task", "content_prompt": "a fox", "image": GRID, "prompt": ...}
UPSAMPLED = {**CLOZE, "upsampling_height": 32, "upsampling_width": 32}
TINY = {
    "FluxPipeline": Recipe(lambda: tiny.flux().components),
    "FluxImg2ImgPipeline": Recipe(flux),
    "FluxInpaintPipeline": Recipe(flux),
    "FluxControlPipeline": Recipe(lambda: flux(32)),
    "FluxControlImg2ImgPipeline": Recipe(lambda: flux(32)),
    "FluxControlInpaintPipeline": Recipe(lambda: flux(32)),
    "FluxControlNetPipeline": Recipe(flux_control),
    "FluxControlNetImg2ImgPipeline": Recipe(flux_control),
    "FluxControlNetInpaintPipeline": Recipe(flux_control),
    "FluxFillPipeline": Recipe(lambda: flux(16 + 16 + 16)),
    "FluxKontextPipeline": Recipe(flux, KONTEXT),
    "FluxKontextInpaintPipeline": Recipe(flux, KONTEXT),
    "VisualClozePipeline": Recipe(visual_cloze, UPSAMPLED),
    "VisualClozeGenerationPipeline": Recipe(visual_cloze, CLOZE),
    "Flux2Pipeline": Recipe(lambda: tiny_transformers.flux2().components, LARGER),
    "Flux2KleinPipeline": Recipe(klein, LARGER),
    "Flux2KleinInpaintPipeline": Recipe(klein),
    "Flux2KleinKVPipeline": Recipe(lambda: klein(True), LARGER),
    "StableDiffusion3Pipeline": Recipe(sd3),
    "StableDiffusion3Img2ImgPipeline": Recipe(sd3),
    "StableDiffusion3InpaintPipeline": Recipe(lambda: sd3(16)),
    "StableDiffusion3PAGPipeline": Recipe(sd3),
    "StableDiffusion3PAGImg2ImgPipeline": Recipe(sd3),
    "StableDiffusion3ControlNetPipeline": Recipe(sd3_control),
    "StableDiffusion3ControlNetInpaintingPipeline": Recipe(lambda: sd3_control(1)),
    "ChromaPipeline": Recipe(chroma),
    "ChromaImg2ImgPipeline": Recipe(chroma),
    "BriaPipeline": Recipe(bria),
    "OvisImagePipeline": Recipe(ovis),
}
