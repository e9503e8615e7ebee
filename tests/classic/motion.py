"""Classes of videos over UNets."""

from __future__ import annotations

from typing import Any

import diffusers

from tests import tiny
from tests.classic.parts import WIDTH, clip_images, clip_vision, small
from tests.classic.recipe import Recipe
from tests.classic.stable_diffusion import control, sd
from tests.classic.stable_diffusion_xl import sdxl

BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}


def adapter() -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )  # fmt: skip


def motion(base: Any = sd, **more: Any) -> dict[str, Any]:
    return {**base(), "motion_adapter": adapter(), **more}


def sparse() -> dict[str, Any]:
    network = diffusers.SparseControlNetModel(
        **BLOCKS, cross_attention_dim=WIDTH, attention_head_dim=4, motion_num_attention_heads=2,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip
    return motion(controlnet=network)


def pia() -> dict[str, Any]:
    config = {**tiny.unet_config(WIDTH), "in_channels": 9}
    return motion(unet=diffusers.UNet2DConditionModel(**config), motion_adapter=adapter())


def clouds(kind: str = "UNet3DConditionModel") -> dict[str, Any]:
    """ModelScope's and I2VGen-XL's UNets of three dimensions."""
    network = small(
        kind, **BLOCKS, attention_head_dim=4, num_attention_heads=None,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return sd(unet=network, image_encoder=clip_vision(), feature_extractor=clip_images())


def stable_video() -> dict[str, Any]:
    return {
        "vae": diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
        ),
        "image_encoder": clip_vision(size=224, patch=56),
        "unet": diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 32), layers_per_block=1, num_attention_heads=(2, 2),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            sample_size=16, addition_time_embed_dim=32, cross_attention_dim=WIDTH,
            projection_class_embeddings_input_dim=96,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            **tiny.BETAS, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
            timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        ),
        "feature_extractor": clip_images(),
    }  # fmt: skip


FRAMES = {"num_frames": 4}
TINY = {
    "AnimateDiffPipeline": Recipe(motion, FRAMES),
    "AnimateDiffPAGPipeline": Recipe(motion, FRAMES),
    "AnimateDiffSDXLPipeline": Recipe(lambda: motion(sdxl), FRAMES),
    "AnimateDiffControlNetPipeline": Recipe(lambda: motion(control)),
    "AnimateDiffSparseControlNetPipeline": Recipe(
        sparse, {"controlnet_frame_indices": [0, 1, 2, 3, 4]}
    ),
    "AnimateDiffVideoToVideoPipeline": Recipe(motion),
    "AnimateDiffVideoToVideoControlNetPipeline": Recipe(lambda: motion(control)),
    "PIAPipeline": Recipe(pia, FRAMES),
    "TextToVideoSDPipeline": Recipe(clouds, FRAMES),
    "VideoToVideoSDPipeline": Recipe(clouds),
    "I2VGenXLPipeline": Recipe(lambda: clouds("I2VGenXLUNet"), {**FRAMES, "clip_skip": None}),
    "StableVideoDiffusionPipeline": Recipe(stable_video, FRAMES),
}
