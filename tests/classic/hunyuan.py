"""Classes of HunyuanImage 2.1, HunyuanVideo 1.5 and HunyuanVideo's image to video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.classic.parts import WIDTH, clip_images, clip_vision, siglip, small
from tests.classic.qwen import qwen_vl, tokenizer
from tests.classic.recipe import Recipe
from tests.classic.videos import hunyuan
from tests.tiny_transformers import flow

TEXTS = {"text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH}


def byt5() -> dict[str, Any]:
    """Encoder of the letters that are to be drawn."""
    words = transformers.ByT5Tokenizer()
    config = transformers.T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {"text_encoder_2": transformers.T5EncoderModel(config), "tokenizer_2": words}


def guider(scale: float = 3.0) -> Any:
    """The component that guides these pipelines, of which no call takes a scale."""
    return diffusers.ClassifierFreeGuidance(guidance_scale=scale)


def image() -> dict[str, Any]:
    words = tokenizer()
    return {
        "transformer": small(
            "HunyuanImageTransformer2DModel", **TEXTS, patch_size=(1, 1), rope_axes_dim=(8, 8)
        ),
        "vae": diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
            layers_per_block=1, spatial_compression_ratio=2, sample_size=32, scaling_factor=0.7,
        ),
        "scheduler": flow(shift=7.0),
        "text_encoder": qwen_vl(words),
        "tokenizer": words,
        **byt5(),
        "guider": guider(),
    }  # fmt: skip


def refiner() -> dict[str, Any]:
    network = small(
        "HunyuanImageTransformer2DModel", text_embed_dim=WIDTH, in_channels=16, out_channels=8,
        patch_size=(1, 1, 1), rope_axes_dim=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2,
    )  # fmt: skip
    return {**image(), "transformer": network, "vae": vae}


def video15(task: str = "t2v") -> dict[str, Any]:
    words = tokenizer()
    network = small(
        "HunyuanVideo15Transformer3DModel", **TEXTS, in_channels=9, patch_size=1,
        image_embed_dim=WIDTH, rope_axes_dim=(4, 4, 8), target_size=32, task_type=task,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    return {
        "transformer": network,
        "vae": vae,
        "scheduler": flow(shift=7.0),
        "text_encoder": qwen_vl(words).model.language_model,
        "tokenizer": words,
        **byt5(),
        **siglip(),
        "guider": guider(),
    }


def llava() -> dict[str, Any]:
    """HunyuanVideo with an encoder that reads the first frame beside the prompt."""
    parts = hunyuan(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False)
    words = parts["tokenizer"]
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=clip_vision(projected=False).config,
        text_config=transformers.LlamaConfig(**parts["text_encoder"].config.to_dict()),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    config.text_config.vocab_size = len(words)
    encoder = transformers.LlavaForConditionalGeneration(config)
    return {**parts, "text_encoder": encoder, "image_processor": clip_images()}


FOUR = {"image_emb_len": 4, "image_emb_start": 5, "image_emb_end": 9}  # patches of an image
TEMPLATE = {"template": "{}", "crop_start": 0, **FOUR}
TINY = {
    "HunyuanImagePipeline": Recipe(image),
    "HunyuanImageRefinerPipeline": Recipe(refiner),
    "HunyuanVideo15Pipeline": Recipe(video15),
    "HunyuanVideo15ImageToVideoPipeline": Recipe(lambda: video15("i2v")),
    "HunyuanVideoImageToVideoPipeline": Recipe(
        llava, {"num_frames": 9, "prompt_template": TEMPLATE, "max_sequence_length": 64}
    ),
}
