"""Classes over the parts of Wan and SkyReels 2."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from tests.classic.parts import WIDTH, clip_images, clip_vision, small, umt5
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.guidance.stock_hosted import picture
from tests.tiny_transformers import flow

SHAPE = {"patch_size": (1, 2, 2), "attention_head_dim": 12, "rope_max_seq_len": 32}


def _known(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: value for name, value in sizes.items() if name in parameters}


def wan(kind: str = "WanTransformer3DModel", vae: str = "wan", **own: Any) -> dict[str, Any]:
    """Wan's parts around a network of a class; image encoder for those that take one."""
    return {
        **umt5(),
        "vae": VAES[vae](),
        "transformer": small(kind, **_known(kind, {**SHAPE, **own})),
        "scheduler": flow(shift=3.0),
        "image_encoder": clip_vision(projected=False),
        "image_processor": clip_images(),
    }


def from_image() -> dict[str, Any]:
    """Image and mask beside the noise: 4 + 4 + 2 channels (2 frames per latent)."""
    return wan(in_channels=10, image_dim=WIDTH, added_kv_proj_dim=24)


def vace() -> dict[str, Any]:
    return wan(
        "WanVACETransformer3DModel", num_layers=2, vace_layers=[0], vace_in_channels=2 * 4 + 4
    )


def animate() -> dict[str, Any]:
    return wan(
        "WanAnimateTransformer3DModel", vae="wan16", num_layers=2, in_channels=36,
        latent_channels=16, out_channels=16, image_dim=WIDTH,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip


def chrono() -> dict[str, Any]:
    return wan(
        "ChronoEditTransformer3DModel", in_channels=10, image_dim=WIDTH, added_kv_proj_dim=24
    )


def skyreels(**own: Any) -> dict[str, Any]:
    return {
        **wan("SkyReelsV2Transformer3DModel", **own),
        "image_encoder": clip_vision(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            flow_shift=5.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }


def any_flow(kind: str = "AnyFlowTransformer3DModel", **own: Any) -> dict[str, Any]:
    parts = wan(kind, gate_value=0.25, deltatime_type="r", **own)
    return {**parts, "scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)}


def helios() -> dict[str, Any]:
    parts = wan(
        "HeliosTransformer3DModel", vae="wan16", in_channels=16, out_channels=16,
        rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True,
        zero_history_timestep=True, is_amplify_history=False,
    )  # fmt: skip
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return {**parts, "scheduler": scheduler}


TOKENS = {"max_sequence_length": 64}
POSE = [picture(k) for k in range(17)]
NINE = {**TOKENS, "num_frames": 9}
TINY = {
    "WanPipeline": Recipe(wan, TOKENS),
    "WanImageToVideoPipeline": Recipe(from_image, TOKENS),
    "WanVideoToVideoPipeline": Recipe(wan, TOKENS),
    "WanVACEPipeline": Recipe(vace, {**TOKENS, "mask": [picture(9)] * 5}),
    "WanAnimatePipeline": Recipe(
        animate, {**TOKENS, "pose_video": POSE, "face_video": POSE, "segment_frame_length": 17}
    ),
    "LucyEditPipeline": Recipe(lambda: wan(in_channels=8), TOKENS),
    "ChronoEditPipeline": Recipe(chrono, TOKENS),
    "SkyReelsV2Pipeline": Recipe(skyreels, NINE),
    "SkyReelsV2ImageToVideoPipeline": Recipe(
        lambda: skyreels(in_channels=10, image_dim=WIDTH), NINE
    ),
    "SkyReelsV2DiffusionForcingPipeline": Recipe(skyreels, NINE),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Recipe(skyreels, NINE),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Recipe(
        skyreels, {**NINE, "overlap_history": 3, "base_num_frames": 9}
    ),
    "AnyFlowPipeline": Recipe(any_flow, {**NINE, "video": ...}),
    "AnyFlowFARPipeline": Recipe(
        lambda: any_flow(
            "AnyFlowFARTransformer3DModel", compressed_patch_size=(1, 4, 4), full_chunk_limit=3,
            chunk_partition=(1, 1, 1, 1, 1),
        ),
        {**NINE, "video": ...},
    ),
    "HeliosPipeline": Recipe(helios, {**NINE, "image": ..., "video": ...}),
}  # fmt: skip
