"""Classes of priors, decoders and pixel cascades: Kandinsky, DeepFloyd IF, unCLIP, Wuerstchen."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from tests import tiny
from tests.classic.parts import WIDTH, clip, clip_images, clip_vision, small, t5
from tests.classic.recipe import Recipe, drawn

SIMPLE = {  # blocks of UNets that attend to image and text embeddings with added keys
    "block_out_channels": (32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "encoder_hid_dim": WIDTH,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 32,
}
UNCLIP = {"variance_type": "fixed_small_log", "prediction_type": "sample"}


def movq() -> Any:
    """VQ autoencoder of 8 pixels per latent, as Kandinsky's pipelines take for granted."""
    return diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
        norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def prior() -> dict[str, Any]:
    tokenizer = tiny.clip_tokenizer(77)
    network = small("PriorTransformer", embedding_dim=WIDTH, attention_head_dim=12)
    torch.nn.init.ones_(network.clip_std)
    return {
        "prior": network,
        "image_encoder": clip_vision(),
        "text_encoder": clip(tokenizer, projected=True),
        "tokenizer": tokenizer,
        "scheduler": diffusers.UnCLIPScheduler(**UNCLIP, clip_sample_range=10.0),
        "image_processor": clip_images(),
    }


def kandinsky22(hint: bool = False, **more: Any) -> dict[str, Any]:
    """Kandinsky 2.2; `hint`: with a depth map as an input of the network."""
    kind = "image_hint" if hint else "image"
    network = diffusers.UNet2DConditionModel(
        **SIMPLE, in_channels=8 if hint else more.pop("channels", 4), out_channels=8,
        addition_embed_type=kind, encoder_hid_dim_type="image_proj",
    )  # fmt: skip
    parts = {"unet": network, "movq": movq(), "scheduler": diffusers.DDIMScheduler(**tiny.DDIM)}
    return {**parts, **{f"prior_{name}": part for name, part in prior().items()}, **more}


def kandinsky21(channels: int = 4) -> dict[str, Any]:
    tokenizer = tiny.clip_tokenizer(77)
    config = MCLIPConfig(
        numDims=WIDTH, transformerDimensions=WIDTH, hidden_size=WIDTH, intermediate_size=32,
        num_attention_heads=2, num_hidden_layers=2, vocab_size=len(tokenizer), pad_token_id=1,
    )  # fmt: skip
    network = diffusers.UNet2DConditionModel(
        **SIMPLE, in_channels=channels, out_channels=8, addition_embed_type="text_image",
        encoder_hid_dim_type="text_image_proj",
    )  # fmt: skip
    encoder = MultilingualCLIP(config)
    return kandinsky22(unet=network, text_encoder=encoder, tokenizer=tokenizer)


def kandinsky3() -> dict[str, Any]:
    network = diffusers.Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return {**t5(128), "unet": network, "movq": movq(), "scheduler": scheduler}


def floyd(channels: int = 3) -> dict[str, Any]:
    """DeepFloyd IF; 6 channels enter its upscalers."""
    upscaler = {"class_embed_type": "timestep"} if channels == 6 else {}
    network = diffusers.UNet2DConditionModel(
        **SIMPLE, in_channels=channels, out_channels=6, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", act_fn="gelu",
        **upscaler,
    )  # fmt: skip
    network.set_attn_processor(diffusers.models.attention_processor.AttnAddedKVProcessor())
    return {
        **t5(77),
        "unet": network,
        "scheduler": diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.0,
            dynamic_thresholding_ratio=0.95, variance_type="learned_range",
        ),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }  # fmt: skip


def unclip() -> dict[str, Any]:
    """Karlo: a prior, a decoder and two upscalers, with a scheduler each."""
    parts = prior()
    simple = {k: v for k, v in SIMPLE.items() if k != "encoder_hid_dim"}
    decoder = diffusers.UNet2DConditionModel(
        **simple, in_channels=3, out_channels=6, class_embed_type="identity"
    )
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=128, cross_attention_dim=WIDTH
    )
    first, last = (
        diffusers.UNet2DModel(
            sample_size=32, in_channels=6, out_channels=3, layers_per_block=1,
            block_out_channels=(32, 32), down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )
        for _ in range(2)
    )  # fmt: skip
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    fixed = {"variance_type": "fixed_small_log", "prediction_type": "epsilon"}
    return {
        **parts, "decoder": decoder, "text_proj": projection, "super_res_first": first,
        "super_res_last": last, "feature_extractor": clip_images(),
        "prior_scheduler": parts["scheduler"],
        "decoder_scheduler": diffusers.UnCLIPScheduler(**learned),
        "super_res_scheduler": diffusers.UnCLIPScheduler(**fixed),
    }  # fmt: skip


FEW = {f"{stage}_num_inference_steps": 2 for stage in ("prior", "decoder", "super_res")}
EMBEDDED = {"image_embeds": drawn(1, WIDTH), "negative_image_embeds": drawn(1, WIDTH, seed=2)}
SMALL = {"height": 64, "width": 64}
COMBINED = {**SMALL, "prior_num_inference_steps": 2}
KANDINSKY = {**EMBEDDED, **SMALL}
HINT = {**KANDINSKY, "hint": drawn(1, 3, 64, 64)}
TINY = {
    "KandinskyV22Pipeline": Recipe(kandinsky22, KANDINSKY),
    "KandinskyV22Img2ImgPipeline": Recipe(kandinsky22, KANDINSKY),
    "KandinskyV22InpaintPipeline": Recipe(lambda: kandinsky22(channels=9), KANDINSKY),
    "KandinskyV22ControlnetPipeline": Recipe(lambda: kandinsky22(True), HINT),
    "KandinskyV22ControlnetImg2ImgPipeline": Recipe(lambda: kandinsky22(True), HINT),
    "KandinskyV22PriorPipeline": Recipe(prior),
    "KandinskyV22PriorEmb2EmbPipeline": Recipe(prior),
    "KandinskyV22CombinedPipeline": Recipe(kandinsky22, COMBINED),
    "KandinskyV22Img2ImgCombinedPipeline": Recipe(kandinsky22, COMBINED),
    "KandinskyV22InpaintCombinedPipeline": Recipe(lambda: kandinsky22(channels=9), COMBINED),
    "KandinskyPipeline": Recipe(kandinsky21, KANDINSKY),
    "KandinskyImg2ImgPipeline": Recipe(kandinsky21, KANDINSKY),
    "KandinskyInpaintPipeline": Recipe(lambda: kandinsky21(9), KANDINSKY),
    "KandinskyPriorPipeline": Recipe(prior),
    "KandinskyCombinedPipeline": Recipe(kandinsky21, COMBINED),
    "KandinskyImg2ImgCombinedPipeline": Recipe(kandinsky21, COMBINED),
    "KandinskyInpaintCombinedPipeline": Recipe(lambda: kandinsky21(9), COMBINED),
    "Kandinsky3Pipeline": Recipe(kandinsky3, SMALL),
    "Kandinsky3Img2ImgPipeline": Recipe(kandinsky3),
    "UnCLIPPipeline": Recipe(unclip, FEW),
    "UnCLIPImageVariationPipeline": Recipe(unclip, FEW),
    "IFPipeline": Recipe(floyd),
    "IFImg2ImgPipeline": Recipe(floyd),
    "IFInpaintingPipeline": Recipe(floyd),
    "IFSuperResolutionPipeline": Recipe(lambda: floyd(6)),
    "IFImg2ImgSuperResolutionPipeline": Recipe(lambda: floyd(6)),
    "IFInpaintingSuperResolutionPipeline": Recipe(lambda: floyd(6)),
}
