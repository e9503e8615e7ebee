"""Classes over the parts of Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import (
    PaintByExampleImageEncoder,
)
from diffusers.pipelines.stable_diffusion import CLIPImageProjection, StableUnCLIPImageNormalizer

from tests import tiny
from tests.classic.parts import WIDTH, clip, clip_images, clip_vision, small, vae
from tests.classic.recipe import Recipe, drawn
from tests.guidance.stock_hosted import controlnet as controlnet_pipe
from tests.guidance.stock_hosted import picture


def unet(channels: int = 4, **options: Any) -> Any:
    config = {**tiny.unet_config(WIDTH), "in_channels": channels, **options}
    return diffusers.UNet2DConditionModel(**config)


def sd(channels: int = 4, **more: Any) -> dict[str, Any]:
    """Parts of Stable Diffusion; `channels` that enter the UNet."""
    parts = {**tiny.sd().components, **more}
    if channels != 4:
        parts["unet"] = unet(channels)
    return parts


def control() -> dict[str, Any]:
    return controlnet_pipe().components


def control_xs() -> dict[str, Any]:
    parts = sd(unet=unet(use_linear_projection=True, layers_per_block=2))
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        parts["unet"], size_ratio=1, conditioning_embedding_out_channels=(4, 4)
    )
    return {**parts, "controlnet": adapter}


def adapter() -> dict[str, Any]:
    found = diffusers.T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2
    )
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    return sd(
        adapter=found,
        unet=unet(down_block_types=down, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    )


def depth() -> dict[str, Any]:
    config = transformers.DPTConfig(
        image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=32, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    return sd(
        5,
        depth_estimator=transformers.DPTForDepthEstimation(config),
        feature_extractor=transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    )


def variation() -> dict[str, Any]:
    return sd(image_encoder=clip_vision(), feature_extractor=clip_images())


def unclip() -> dict[str, Any]:
    """Stable unCLIP: the noised image embedding is a class embedding of the UNet."""
    tokenizer = tiny.clip_tokenizer(77)
    return sd(
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        image_encoder=clip_vision(),
        feature_extractor=clip_images(),
        image_normalizer=StableUnCLIPImageNormalizer(WIDTH),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        prior_tokenizer=tokenizer,
        prior_text_encoder=clip(tokenizer, projected=True),
        prior=small("PriorTransformer", embedding_dim=WIDTH, attention_head_dim=12),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
    )


def upscale() -> dict[str, Any]:
    return sd(
        unet=unet(7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
    )


def latent_upscale() -> dict[str, Any]:
    k_unet = diffusers.UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None,
        time_cond_proj_dim=2 * 64 + WIDTH, block_out_channels=(32, 32, 64, 64), conv_in_kernel=1,
        conv_out_kernel=1, in_channels=8,
        cross_attention_dim=WIDTH, mid_block_type=None, only_cross_attention=False, out_channels=5,
        down_block_types=("KDownBlock2D",) + 3 * ("KCrossAttnDownBlock2D",), layers_per_block=1,
        up_block_types=3 * ("KCrossAttnUpBlock2D",) + ("KUpBlock2D",),
        time_embedding_type="fourier", resnet_time_scale_shift="scale_shift",
        timestep_post_act="gelu",
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    return sd(unet=k_unet, scheduler=scheduler, vae=vae(4, 4))


def inverse() -> dict[str, Any]:
    parts = sd()
    return {**parts, "inverse_scheduler": diffusers.DDIMInverseScheduler(**tiny.DDIM)}


def gligen(attention: str = "gated") -> dict[str, Any]:
    parts = sd(unet=unet(attention_type=attention))
    for name, gate in parts["unet"].named_parameters():
        if "alpha_" in name:
            torch.nn.init.ones_(gate)  # 0 in the class
    return {
        **parts,
        "image_encoder": clip_vision(),
        "image_project": CLIPImageProjection(WIDTH),
        "processor": None,
    }


def example() -> dict[str, Any]:
    """Paint by Example."""
    encoder = clip_vision(projected=False).config
    encoder.projection_dim = WIDTH
    return sd(
        9,
        image_encoder=PaintByExampleImageEncoder(encoder, proj_size=WIDTH),
        feature_extractor=clip_images(),
    )


def lcm() -> dict[str, Any]:
    """A UNet that takes the guidance scale as an input."""
    scheduler = diffusers.LCMScheduler(**tiny.BETAS)
    return {**tiny.sd(time_cond=8).components, "scheduler": scheduler}


def marigold(outputs: int = 4) -> dict[str, Any]:
    return sd(
        unet=unet(4 + outputs, out_channels=outputs),
        prediction_type="depth",
        default_denoising_steps=3,
        default_processing_resolution=32,
        target_properties={"target_names": ["albedo", "roughness"]},
    )


TINY = {
    "StableDiffusionPipeline": Recipe(sd),
    "StableDiffusionImg2ImgPipeline": Recipe(sd),
    "StableDiffusionInpaintPipeline": Recipe(lambda: sd(9)),
    "StableDiffusionInstructPix2PixPipeline": Recipe(lambda: sd(8)),
    "StableDiffusionPAGPipeline": Recipe(sd),
    "StableDiffusionPAGImg2ImgPipeline": Recipe(sd),
    "StableDiffusionPAGInpaintPipeline": Recipe(lambda: sd(9)),
    "StableDiffusionControlNetPipeline": Recipe(control),
    "StableDiffusionControlNetImg2ImgPipeline": Recipe(control),
    "StableDiffusionControlNetInpaintPipeline": Recipe(control),
    "StableDiffusionControlNetPAGPipeline": Recipe(control),
    "StableDiffusionControlNetPAGInpaintPipeline": Recipe(control),
    "StableDiffusionControlNetXSPipeline": Recipe(control_xs),
    "StableDiffusionAdapterPipeline": Recipe(adapter),
    "StableDiffusionDepth2ImgPipeline": Recipe(depth),
    "StableDiffusionImageVariationPipeline": Recipe(variation),
    "StableUnCLIPPipeline": Recipe(unclip, {"prior_num_inference_steps": 2}),
    "StableUnCLIPImg2ImgPipeline": Recipe(unclip),
    "StableDiffusionUpscalePipeline": Recipe(upscale),
    "StableDiffusionLatentUpscalePipeline": Recipe(latent_upscale, {"image": picture(1, (64, 64))}),
    "StableDiffusionDiffEditPipeline": Recipe(
        inverse, {"image_latents": drawn(1, 2, 4, 16, 16), "mask_image": drawn(1, 16, 16) > 0}
    ),
    "StableDiffusionGLIGENPipeline": Recipe(
        gligen, {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    ),
    "StableDiffusionGLIGENTextImagePipeline": Recipe(
        lambda: gligen("gated-text-image"),
        {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    ),
    "StableDiffusionLDM3DPipeline": Recipe(
        lambda: sd(vae=vae(in_channels=6, out_channels=6)), {"output_type": "np"}
    ),
    "StableDiffusionSAGPipeline": Recipe(sd),
    "StableDiffusionPanoramaPipeline": Recipe(sd, {"height": 64, "width": 64}),
    "StableDiffusionAttendAndExcitePipeline": Recipe(
        sd, {"token_indices": [2], "attn_res": (8, 8), "max_iter_to_alter": 1}
    ),
    "StableDiffusionParadigmsPipeline": Recipe(
        lambda: sd(scheduler=diffusers.DDIMParallelScheduler(**tiny.DDIM))
    ),
    "StableDiffusionModelEditingPipeline": Recipe(sd),
    "StableDiffusionPix2PixZeroPipeline": Recipe(
        inverse,
        {
            "source_embeds": drawn(2, 16, WIDTH),
            "target_embeds": drawn(2, 16, WIDTH, seed=2),
        },
    ),
    "SemanticStableDiffusionPipeline": Recipe(sd),
    "CycleDiffusionPipeline": Recipe(
        lambda: sd(scheduler=diffusers.DDIMScheduler(**{**tiny.DDIM, "set_alpha_to_one": False})),
        {"source_prompt": "a cat"},
    ),
    "PaintByExamplePipeline": Recipe(example, {"example_image": picture(2)}),
    "LatentConsistencyModelPipeline": Recipe(lcm),
    "LatentConsistencyModelImg2ImgPipeline": Recipe(lcm),
    "MarigoldDepthPipeline": Recipe(marigold),
    "MarigoldNormalsPipeline": Recipe(marigold),
    "MarigoldIntrinsicsPipeline": Recipe(lambda: marigold(8)),
    "TextToVideoZeroPipeline": Recipe(sd, {"video_length": 2, "t0": 1, "t1": 2}),
}
