"""Tiny random pipelines, built in memory from configurations: no file and no network.

Every function returns a fresh pipeline (tests may change it) with weights that depend on `seed`
only. The VAE scale factor is 2 everywhere, so an image of 32 x 48 has latents of 16 x 24.

    sd(prediction="eps" | "v" | "zero_snr")   Stable Diffusion 1.x/2.x, CLIP of 16 tokens
    sdxl()      two text encoders, pooled embedding, time ids
    pixart()    PixArt-Sigma: T5 with masks, learned sigma (8 channels out of 4)
    pixart_alpha()   the same with resolution and aspect-ratio conditions
    sd3(), flux(guidance_embeds=False), dit(), qwen()   for the guidance hook
"""

from __future__ import annotations

import functools

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
PREDICTIONS = {
    "eps": {},
    "v": {"prediction_type": "v_prediction"},
    "zero_snr": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
TEXT_TIME = {  # of UNets that are told a pooled text and the image's size
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.1, 0.8, 1.0, 1.3]}


def seeded(build):
    """The builder's weights come from its `seed` argument; the caller's random state is kept."""

    @functools.wraps(build)
    def wrapper(*args, seed=0, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = build(*args, **kwargs)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return wrapper


@seeded
def sd(prediction="eps", scheduler=None, tiny_vae=False, time_cond=None):
    """Stable Diffusion; `time_cond`: size of the guidance embedding, as in LCM."""
    tokenizer = clip_tokenizer(16)
    return StableDiffusionPipeline(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        if tiny_vae
        else vae(4),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet_config(32), time_cond_proj_dim=time_cond),
        scheduler=scheduler or DDIMScheduler(**DDIM, **PREDICTIONS[prediction]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def sdxl(scheduler=None, force_zeros=True):
    tokenizer = clip_tokenizer(16)
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(16),
        unet=UNet2DConditionModel(**unet_config(64), **TEXT_TIME),
        scheduler=scheduler or DDIMScheduler(**DDIM),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


@seeded
def pixart(scheduler=None):
    return PixArtSigmaPipeline(**_pixart_parts(scheduler, 16, use_additional_conditions=False))


@seeded
def pixart_alpha(scheduler=None):
    """With resolution and aspect-ratio conditions: the stock pipeline gives them where the sample
    size is 128, so give height and width to stay small."""
    return PixArtAlphaPipeline(**_pixart_parts(scheduler, 128, use_additional_conditions=True))


def _pixart_parts(scheduler, sample_size, use_additional_conditions):
    tokenizer = t5_tokenizer(16)
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer, 32),
        "vae": vae(4),
        "transformer": PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=sample_size,
            patch_size=2,
            norm_type="ada_norm_single",
            use_additional_conditions=use_additional_conditions,
        ),
        "scheduler": scheduler or DDIMScheduler(**DDIM),
    }


@seeded
def sd3(scheduler=None):
    tokenizer, words = clip_tokenizer(77), t5_tokenizer(77)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
        ),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(4),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer_2=clip_tokenizer(77),
        text_encoder_3=t5(words, 64),
        tokenizer_3=words,
    )


@seeded
def flux(guidance_embeds=False, scheduler=None):
    tokenizer, words = clip_tokenizer(77), t5_tokenizer(77)
    return FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_vae(4),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5(words, 32),
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
    )


@seeded
def dit(scheduler=None):
    """Class-conditional; the null class is 1000, and the batch order is [cond, uncond]."""
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=16,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ),
        vae=vae(4),
        scheduler=scheduler or DDIMScheduler(**DDIM),
    )


@seeded
def qwen(scheduler=None):
    """Without a text encoder: give prompt_embeds [B, T, 16] and a mask, see `qwen_inputs`."""
    return QwenImagePipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_vae([1, 2, 4], [False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        text_encoder=None,
        tokenizer=None,
        transformer=qwen_transformer(),
    )


def qwen_inputs(batch=1, tokens=7, seed=0):
    """prompt_embeds, prompt_embeds_mask and their negative twins, as arguments of the pipeline."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 16, generator=g),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": torch.randn(batch, tokens, 16, generator=g),
        "negative_prompt_embeds_mask": mask.clone(),
    }


def clip_tokenizer(length):
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", "<pad>", *letters, *(a + "</w>" for a in letters)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token="<|endoftext|>",
        model_max_length=length,
    )


def clip_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(length):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer, size, config=T5Config, model=T5EncoderModel):
    settings = config(
        vocab_size=len(tokenizer),
        d_model=size,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model(settings)


def unet_config(cross):
    return {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": cross,
        "attention_head_dim": 4,
    }


def vae_config(channels, blocks=(8, 16)):
    """2 ** (len(blocks) - 1) pixels per latent."""
    return {
        "block_out_channels": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }


def vae(channels, **options):
    return AutoencoderKL(**vae_config(channels), **options)


def qwen_vae(widths, temporal, **statistics):
    return AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=widths,
        num_res_blocks=1,
        temperal_downsample=temporal,
        **statistics,
    )


def qwen_transformer(**options):
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        **options,
    )


def flow_vae(channels):
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}
    return vae(channels, scaling_factor=1.5305, **options)
