"""Classes of pixels and of small latent models, and of Wuerstchen's and Stable Cascade's stages."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
from diffusers.pipelines.deprecated.wuerstchen import modeling_paella_vq_model as paella_vq
from diffusers.pipelines.deprecated.wuerstchen import (
    modeling_wuerstchen_diffnext as decoder_network,
)
from diffusers.pipelines.deprecated.wuerstchen import modeling_wuerstchen_prior as prior_network

from tests import tiny, tiny_transformers
from tests.classic.parts import WIDTH, clip, randomised, vae
from tests.classic.recipe import Recipe, drawn
from tests.classic.stable_diffusion import unet

CASCADE = {
    "block_out_channels": (16, 32), "num_attention_heads": (-1, 2), "dropout": (0.0, 0.0),
    "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
    "conditioning_dim": WIDTH, "clip_text_pooled_in_channels": WIDTH,
    "block_types_per_layer": (
        ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
        ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
    ),
}  # fmt: skip


def vq(channels: int = 4) -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
        num_vq_embeddings=16,
    )  # fmt: skip


def pixels(scheduler: str = "DDIMScheduler", **own: Any) -> dict[str, Any]:
    return {
        "unet": tiny_transformers.pixel_unet(**own),
        "scheduler": getattr(diffusers, scheduler)(),
    }


def latent_text() -> dict[str, Any]:
    """The first latent diffusion model; `bert` encodes its texts."""
    tokenizer = tiny.clip_tokenizer(77)
    return {
        "vqvae": vae(4), "bert": clip(tokenizer), "tokenizer": tokenizer, "unet": unet(),
        "scheduler": diffusers.DDIMScheduler(**tiny.DDIM),
    }  # fmt: skip


def latent_pixels(channels: int = 4, inputs: int = 4) -> dict[str, Any]:
    """`channels` of the latents, `inputs` of the network."""
    network = tiny_transformers.pixel_unet(in_channels=inputs, out_channels=channels)
    return {"vqvae": vq(channels), "unet": network, "scheduler": diffusers.DDIMScheduler()}


def paella() -> Any:
    return paella_vq.PaellaVQModel(
        bottleneck_blocks=1, num_vq_embeddings=8, levels=2, embed_dim=16, latent_channels=4
    )


def cascade_prior() -> dict[str, Any]:
    tokenizer = tiny.clip_tokenizer(77)
    network = diffusers.StableCascadeUNet(
        **CASCADE, in_channels=4, out_channels=4, switch_level=(False,), clip_seq=4,
        clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": clip(tokenizer, projected=True),
        "prior": network,
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def cascade_decoder() -> dict[str, Any]:
    network = diffusers.StableCascadeUNet(
        **CASCADE, in_channels=4, out_channels=4, patch_size=2, switch_level=None,
        effnet_in_channels=4, pixel_mapper_in_channels=3,
    )  # fmt: skip
    return {**cascade_prior(), "decoder": network, "vqgan": paella(), "latent_dim_scale": 4.0}


def wuerstchen_prior() -> dict[str, Any]:
    tokenizer = tiny.clip_tokenizer(77)
    return {
        "tokenizer": tokenizer,
        "text_encoder": clip(tokenizer),
        "prior": prior_network.WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=1, nhead=2),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


def wuerstchen_decoder() -> dict[str, Any]:
    """Its network divides by 1 − sigmoid of a part of its last layer, of which weights of the usual
    size leave 1e-3, so that its rounding would be magnified a thousandfold."""
    parts = wuerstchen_prior()
    network = decoder_network.WuerstchenDiffNeXt(
        c_r=8, c_cond=WIDTH, c_hidden=[16, 32], nhead=[-1, 2], blocks=[1, 1], effnet_embd=4,
        level_config=["CT", "CTA"], inject_effnet=[False, True], clip_embd=WIDTH, dropout=0.0,
    )  # fmt: skip
    randomised(parts["prior"])
    randomised(network)
    network.clf[1].weight.data *= 0.1
    return {**parts, "decoder": network, "vqgan": paella(), "latent_dim_scale": 4.0}


def combined(parts: dict[str, Any]) -> dict[str, Any]:
    """Parts of a decoder with those of its prior under a prefix, of the pipeline of both."""
    own = {f"prior_{name}": part for name, part in parts.items()}
    return {**parts, **own, "prior_scheduler": copy.deepcopy(parts["scheduler"])}


def amused() -> dict[str, Any]:
    tokenizer = tiny.clip_tokenizer(77)
    network = diffusers.UVit2DModel(
        hidden_size=8, cond_embed_dim=WIDTH, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH, vocab_size=34, codebook_size=32, in_channels=8,
        block_out_channels=8, num_res_blocks=1, block_num_heads=1, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=16, sample_size=16, downsample=True, upsample=True,
    )  # fmt: skip
    model = diffusers.VQModel(
        block_out_channels=(8,), latent_channels=8, norm_num_groups=8, num_vq_embeddings=32,
        layers_per_block=1, mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    return {
        "vqvae": model, "tokenizer": tokenizer, "text_encoder": clip(tokenizer, True),
        "transformer": network, "scheduler": diffusers.AmusedScheduler(33),
    }  # fmt: skip


BOTH = {"prior_num_inference_steps": 2, "decoder_guidance_scale": 3.0, "height": 128, "width": 128}
IMAGES = {"image_embeddings": drawn(1, 4, 4, 4)}
TINY = {
    "DDIMPipeline": Recipe(pixels),
    "DDPMPipeline": Recipe(lambda: pixels("DDPMScheduler")),
    "PNDMPipeline": Recipe(lambda: pixels("PNDMScheduler"), {"num_inference_steps": 8}),
    "ScoreSdeVePipeline": Recipe(lambda: pixels("ScoreSdeVeScheduler")),
    "KarrasVePipeline": Recipe(lambda: pixels("KarrasVeScheduler")),
    "ConsistencyModelPipeline": Recipe(
        lambda: pixels("CMStochasticIterativeScheduler", num_class_embeds=10)
    ),
    "RePaintPipeline": Recipe(
        lambda: pixels("RePaintScheduler"), {"jump_length": 1, "jump_n_sample": 1}
    ),
    "LDMPipeline": Recipe(latent_pixels),
    "LDMSuperResolutionPipeline": Recipe(lambda: latent_pixels(3, 6)),
    "LDMTextToImagePipeline": Recipe(latent_text, {"guidance_scale": 3.0}),
    "StableCascadePriorPipeline": Recipe(cascade_prior),
    "StableCascadeDecoderPipeline": Recipe(cascade_decoder, IMAGES),
    "StableCascadeCombinedPipeline": Recipe(lambda: combined(cascade_decoder()), BOTH),
    "WuerstchenPriorPipeline": Recipe(wuerstchen_prior),
    "WuerstchenDecoderPipeline": Recipe(wuerstchen_decoder, IMAGES, drawn=False),
    "WuerstchenCombinedPipeline": Recipe(
        lambda: combined(wuerstchen_decoder()), {**BOTH, "decoder_guidance_scale": 3.0}, drawn=False
    ),
    "AmusedPipeline": Recipe(amused),
    "AmusedImg2ImgPipeline": Recipe(amused),
    "AmusedInpaintPipeline": Recipe(amused),
}
