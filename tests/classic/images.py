"""Classes of images over transformers with encoders of T5, Gemma, GLM and others."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
import transformers
from transformers.models.siglip2 import image_processing_pil_siglip2 as siglip2

from tests import tiny, tiny_transformers
from tests.classic.parts import WIDTH, clip, decoder, small, t5, vae
from tests.classic.recipe import Recipe
from tests.guidance.stock_hosted import picture
from tests.tiny_transformers import flow, gemma_tokenizer, qwen_tokenizer


def of(build: Any, **more: Any) -> dict[str, Any]:
    """Parts of a pipeline of the tests."""
    return {**build().components, **more}


def sizes_of(network: Any, kind: str) -> dict[str, Any]:
    """Settings of a network that a class of this name takes too."""
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: value for name, value in network.config.items() if name in known}


def sana_control() -> dict[str, Any]:
    parts = of(tiny_transformers.sana)
    config = {**parts["transformer"].config, "num_layers": 1}
    network = diffusers.SanaControlNetModel.from_config(config)
    return {**parts, "controlnet": network}


def sprint() -> dict[str, Any]:
    parts = of(tiny_transformers.sana)
    config = sizes_of(parts["transformer"], "SanaTransformer2DModel")
    scheduler = diffusers.SCMScheduler()
    network = diffusers.SanaTransformer2DModel(**{**config, "guidance_embeds": True})
    return {**parts, "transformer": network, "scheduler": scheduler}


def hunyuan_control() -> dict[str, Any]:
    parts = of(tiny_transformers.hunyuan_dit)
    network = small(
        "HunyuanDiT2DControlNetModel",
        **sizes_of(parts["transformer"], "HunyuanDiT2DControlNetModel"),
        transformer_num_layers=2,
    )
    return {**parts, "controlnet": network}


def qwen_control(extra: int = 0) -> dict[str, Any]:
    parts = of(tiny_transformers.qwen_image)
    own = sizes_of(parts["transformer"], "QwenImageControlNetModel")
    network = small("QwenImageControlNetModel", **own, extra_condition_channels=extra)
    return {**parts, "controlnet": network}


def z_control(inputs: int = 4) -> dict[str, Any]:
    parts = of(tiny_transformers.z_image)
    network = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=inputs, dim=32,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    return {**parts, "controlnet": network}


class Rounding(diffusers.AutoencoderKL):
    """An autoencoder that takes images in another precision than its own."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        return super().encode(x.to(self.dtype), return_dict)


def z_omni() -> dict[str, Any]:
    """The class rounds the images that it is given to bfloat16, whatever its parts are of."""
    parts = of(tiny_transformers.z_image)
    kind = "ZImageTransformer2DModel"
    network = small(kind, **{**sizes_of(parts["transformer"], kind), "siglip_feat_dim": WIDTH})
    for name in ("x_pad_token", "cap_pad_token", "siglip_pad_token"):
        torch.nn.init.normal_(getattr(network, name))  # left uninitialised by the class
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_patches=16, patch_size=8,
    )  # fmt: skip
    return {
        **parts,
        "transformer": network,
        "vae": Rounding.from_config(parts["vae"].config),
        "siglip": transformers.Siglip2VisionModel(config),
        "siglip_processor": siglip2.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    }


def lumina() -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    network = small(
        "LuminaNextDiT2DModel", hidden_size=24, num_attention_heads=3, multiple_of=16,
        sample_size=16, cross_attention_dim=WIDTH, learn_sigma=True,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": decoder("Gemma", tokenizer),
        "transformer": network,
        "vae": vae(4),
        "scheduler": flow(),
    }


def cogview3() -> dict[str, Any]:
    network = small("CogView3PlusTransformer2DModel", condition_dim=8, pos_embed_max_size=32)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **tiny.BETAS, prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    return {**t5(224), "transformer": network, "vae": vae(4), "scheduler": scheduler}


def cogview4(channels: int = 4) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    network = small(
        "CogView4Transformer2DModel", in_channels=channels, condition_dim=8, pos_embed_max_size=32,
        rope_axes_dim=(32, 32),
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": decoder("Glm", tokenizer),
        "transformer": network,
        "vae": vae(4),
        "scheduler": flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    }


def hidream() -> dict[str, Any]:
    first, second, llama = tiny.clip_tokenizer(77), tiny.clip_tokenizer(77), qwen_tokenizer()
    network = small(
        "HiDreamImageTransformer2DModel", caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH,
        num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 4, 8),
        max_resolution=(32, 32), llama_layers=[0, 1],
    )  # fmt: skip
    return {
        "scheduler": flow(),
        "vae": tiny.flow_vae(4),
        "text_encoder": clip(first, True),
        "tokenizer": first,
        "text_encoder_2": clip(second, True),
        "tokenizer_2": second,
        **t5(77, number="_3"),
        "text_encoder_4": decoder("Llama", llama, 2, "ForCausalLM"),
        "tokenizer_4": llama,
        "transformer": network,
    }


SMALLEST = {"height": 64, "width": 64}
SPRINT = {"intermediate_timesteps": None}
TINY = {
    "AuraFlowPipeline": Recipe(lambda: of(tiny_transformers.aura_flow)),
    "DiTPipeline": Recipe(lambda: of(tiny.dit)),
    "PixArtAlphaPipeline": Recipe(lambda: of(tiny.pixart_alpha)),
    "PixArtSigmaPipeline": Recipe(lambda: of(tiny.pixart)),
    "PixArtSigmaPAGPipeline": Recipe(lambda: of(tiny.pixart)),
    "SanaPipeline": Recipe(lambda: of(tiny_transformers.sana)),
    "SanaPAGPipeline": Recipe(lambda: of(tiny_transformers.sana)),
    "SanaControlNetPipeline": Recipe(sana_control),
    "SanaSprintPipeline": Recipe(sprint, SPRINT),
    "SanaSprintImg2ImgPipeline": Recipe(sprint, SPRINT),
    "HunyuanDiTPipeline": Recipe(lambda: of(tiny_transformers.hunyuan_dit)),
    "HunyuanDiTPAGPipeline": Recipe(lambda: of(tiny_transformers.hunyuan_dit)),
    "HunyuanDiTControlNetPipeline": Recipe(hunyuan_control),
    "Lumina2Pipeline": Recipe(lambda: of(tiny_transformers.lumina2)),
    "LuminaPipeline": Recipe(lumina),
    "QwenImagePipeline": Recipe(lambda: of(tiny_transformers.qwen_image)),
    "QwenImageImg2ImgPipeline": Recipe(lambda: of(tiny_transformers.qwen_image)),
    "QwenImageInpaintPipeline": Recipe(lambda: of(tiny_transformers.qwen_image)),
    "QwenImageControlNetPipeline": Recipe(qwen_control),
    "QwenImageControlNetInpaintPipeline": Recipe(lambda: qwen_control(4)),
    "ZImagePipeline": Recipe(lambda: of(tiny_transformers.z_image)),
    "ZImageImg2ImgPipeline": Recipe(lambda: of(tiny_transformers.z_image)),
    "ZImageInpaintPipeline": Recipe(lambda: of(tiny_transformers.z_image)),
    "ZImageOmniPipeline": Recipe(z_omni, {"image": picture(1, (64, 64)), **SMALLEST}),
    "ZImageControlNetPipeline": Recipe(z_control),
    "ZImageControlNetInpaintPipeline": Recipe(lambda: z_control(9)),
    "CogView3PlusPipeline": Recipe(cogview3),
    "CogView4Pipeline": Recipe(cogview4),
    "CogView4ControlPipeline": Recipe(lambda: cogview4(8)),
    "HiDreamImagePipeline": Recipe(hidream, {"max_sequence_length": 64}),
}
