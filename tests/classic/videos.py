"""Classes of videos over transformers with encoders of T5, Llama and Gemma."""

from __future__ import annotations

from typing import Any

import diffusers

from tests import tiny
from tests.classic.parts import WIDTH, clip, decoder, siglip, small, t5
from tests.classic.qwen import qwen_vl, tokenizer
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.guidance.stock_hosted import picture
from tests.tiny_transformers import flow, gemma_tokenizer, qwen_tokenizer


def latte() -> dict[str, Any]:
    network = small(
        "LatteTransformer3DModel", attention_head_dim=8, num_attention_heads=3, out_channels=8,
        cross_attention_dim=24, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**tiny.DDIM)
    return {**t5(120), "transformer": network, "vae": tiny.vae(4), "scheduler": scheduler}


def allegro() -> dict[str, Any]:
    network = small(
        "AllegroTransformer3DModel", attention_head_dim=12, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=8,
    )  # fmt: skip
    vae = VAES["allegro"]()
    vae.enable_tiling()
    scheduler = diffusers.DDIMScheduler(**tiny.DDIM)
    return {**t5(64), "transformer": network, "vae": vae, "scheduler": scheduler}


def cogvideo(channels: int = 4) -> dict[str, Any]:
    network = small(
        "CogVideoXTransformer3DModel", in_channels=channels, time_embed_dim=2, sample_width=4,
        sample_height=4, sample_frames=9, max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **tiny.BETAS, prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    return {**t5(226), "transformer": network, "vae": VAES["cogvideo"](), "scheduler": scheduler}


def mochi() -> dict[str, Any]:
    network = small(
        "MochiTransformer3DModel", attention_head_dim=8, num_layers=2, in_channels=12,
        out_channels=None, time_embed_dim=4, max_sequence_length=256, pooled_projection_dim=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {**t5(256), "transformer": network, "vae": VAES["mochi"](), "scheduler": scheduler}


def ltx() -> dict[str, Any]:
    network = small(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, patch_size=1,
        cross_attention_dim=WIDTH,
    )  # fmt: skip
    return {**t5(128), "transformer": network, "vae": VAES["ltx"](), "scheduler": flow(shift=2.0)}


def hunyuan(kind: str = "HunyuanVideoTransformer3DModel", **own: Any) -> dict[str, Any]:
    tokenizer, words = qwen_tokenizer(), tiny.clip_tokenizer(77)
    settings = {
        "attention_head_dim": 10,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
    }
    network = small(kind, **{**settings, "rope_axes_dim": (2, 4, 4), **own})
    return {
        "text_encoder": decoder("Llama", tokenizer, 4),
        "tokenizer": tokenizer,
        "text_encoder_2": clip(words),
        "tokenizer_2": words,
        "transformer": network,
        "vae": VAES["hunyuan"](),
        "scheduler": flow(shift=7.0),
    }


def framepack() -> dict[str, Any]:
    network = hunyuan(
        "HunyuanVideoFramepackTransformer3DModel", patch_size=2, image_condition_type=None,
        has_image_proj=True, image_proj_dim=WIDTH, has_clean_x_embedder=True,
    )  # fmt: skip
    return {**network, **siglip()}


def cosmos(kind: str = "wan", conditioned: bool = False, edm: bool = False) -> dict[str, Any]:
    channels = 16 if kind == "wan16" else 4
    network = small(
        "CosmosTransformer3DModel", in_channels=channels + conditioned, out_channels=channels,
        adaln_lora_dim=4, mlp_ratio=2, max_size=(8, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip
    scheduler = (
        diffusers.EDMEulerScheduler(
            sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        )
        if edm
        else flow(use_karras_sigmas=True)
    )
    return {
        **t5(512),
        "transformer": network,
        "vae": VAES["cosmos" if edm else "wan"](),
        "scheduler": scheduler,
        "safety_checker": Safe(),
    }


def cosmos25(control: bool = False) -> dict[str, Any]:
    """Cosmos 2.5; `control`: with a ControlNet."""
    words = tokenizer()
    own = {"controlnet_block_every_n": 1, "img_context_dim_in": WIDTH, "img_context_num_tokens": 4,
           "img_context_dim_out": WIDTH} if control else {}  # fmt: skip
    shared = {
        "adaln_lora_dim": 4, "mlp_ratio": 2, "max_size": (8, 32, 32), "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable",
        "text_embed_dim": 2 * WIDTH,  # of both layers of the encoder
    }  # fmt: skip
    network = small(
        "CosmosTransformer3DModel", in_channels=17, out_channels=16, concat_padding_mask=True,
        **shared, **own,
    )  # fmt: skip
    parts = {
        "text_encoder": qwen_vl(words), "tokenizer": words, "transformer": network,
        "vae": VAES["wan16"](), "safety_checker": Safe(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            flow_shift=5.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    }  # fmt: skip
    if control:
        parts["controlnet"] = diffusers.CosmosControlNetModel(
            n_controlnet_blocks=1, in_channels=18, latent_channels=18, model_channels=32,
            num_attention_heads=2, attention_head_dim=16,
            img_context_dim_in=WIDTH, img_context_dim_out=WIDTH, use_crossattn_projection=False,
            **shared,
        )  # fmt: skip
    return parts


class Safe:
    """A guardrail of Cosmos that lets everything pass."""

    def to(self, *_: Any, **__: Any) -> Safe:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def sana_video() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    network = small(
        "SanaVideoTransformer3DModel", attention_head_dim=12, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, patch_size=(1, 2, 2), sample_size=8,
        rope_max_seq_len=32,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": decoder("Gemma2", tokenizer),
        "transformer": network,
        "vae": VAES["wan"](),
        "scheduler": flow(shift=7.0),
    }


FRAMES = [picture(k) for k in range(9)]
TEMPLATE = {"num_frames": 5, "prompt_template": {"template": "{}", "crop_start": 0}}
SANA = {"complex_human_instruction": [], "frames": 9}
COSMOS = {"num_frames": 9, "output_type": "latent"}  # its frames are rounded to 8 bits
TINY = {
    "LattePipeline": Recipe(latte, {"video_length": 2}),
    "AllegroPipeline": Recipe(
        allegro,  # its decoder makes black frames of videos smaller than a tile
        {"num_frames": 8, "max_sequence_length": 64, "output_type": "latent"},
    ),
    "CogVideoXPipeline": Recipe(cogvideo, {"num_frames": 9}),
    "CogVideoXImageToVideoPipeline": Recipe(lambda: cogvideo(8), {"num_frames": 9}),
    "CogVideoXVideoToVideoPipeline": Recipe(cogvideo, {"video": FRAMES}),
    "CogVideoXFunControlPipeline": Recipe(lambda: cogvideo(8), {"control_video": FRAMES}),
    "MochiPipeline": Recipe(mochi, {"num_frames": 7}),
    "LTXPipeline": Recipe(ltx, {"num_frames": 9}),
    "LTXImageToVideoPipeline": Recipe(ltx, {"num_frames": 9}),
    "LTXConditionPipeline": Recipe(
        lambda: {**ltx(), "scheduler": flow()}, {"num_frames": 9, "video": ..., "strength": 1.0}
    ),
    "LTXI2VLongMultiPromptPipeline": Recipe(ltx, {"num_frames": 9}),
    "HunyuanVideoPipeline": Recipe(hunyuan, TEMPLATE),
    "HunyuanSkyreelsImageToVideoPipeline": Recipe(lambda: hunyuan(in_channels=8), TEMPLATE),
    "HunyuanVideoFramepackPipeline": Recipe(framepack, {**TEMPLATE, "latent_window_size": 3}),
    "CosmosTextToWorldPipeline": Recipe(lambda: cosmos(edm=True), COSMOS),
    "CosmosVideoToWorldPipeline": Recipe(
        lambda: cosmos(conditioned=True, edm=True), {**COSMOS, "video": ...}
    ),
    "Cosmos2TextToImagePipeline": Recipe(cosmos, {"output_type": "latent"}),
    "Cosmos2VideoToWorldPipeline": Recipe(
        lambda: cosmos(conditioned=True), {**COSMOS, "video": ...}
    ),
    "Cosmos2_5_PredictBasePipeline": Recipe(
        cosmos25, {"num_frames": 5, "max_sequence_length": 16, "image": ..., "video": ...}
    ),
    "Cosmos2_5_TransferPipeline": Recipe(
        lambda: cosmos25(True),
        {
            "num_frames": 5,
            "max_sequence_length": 16,
            "controls": FRAMES[:5],
            "num_frames_per_chunk": 5,
        },
    ),
    "SanaVideoPipeline": Recipe(sana_video, SANA),
    "SanaImageToVideoPipeline": Recipe(sana_video, SANA),
}
