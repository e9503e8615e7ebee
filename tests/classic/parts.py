"""Encoders, tokenizers and autoencoders that the tiny pipelines of many classes share.

`small(cls, ...)` builds any network of diffusers from the few sizes below, as far as its class
takes them; a recipe names only what differs.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from tests import tiny

WIDTH = 32  # of every text embedding

SIZES: dict[str, Any] = {
    **{"patch_size": 2, "sample_size": 16, "in_channels": 4, "out_channels": 4},
    **{"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    **{"num_attention_heads": 2, "attention_head_dim": 16, "num_kv_heads": 1},
    **{"joint_attention_dim": WIDTH, "cross_attention_dim": WIDTH, "caption_channels": WIDTH},
    **{"pooled_projection_dim": WIDTH, "text_dim": WIDTH, "text_embed_dim": WIDTH},
    **{"ffn_dim": WIDTH, "freq_dim": WIDTH, "time_embed_dim": WIDTH, "hidden_size": WIDTH},
}


def small(cls: Any, **own: Any) -> Any:
    """A network of this class (or name) with these settings and else the sizes above."""
    cls = getattr(diffusers, cls) if isinstance(cls, str) else cls
    known = inspect.signature(cls.__init__).parameters
    return cls(**{**{name: value for name, value in SIZES.items() if name in known}, **own})


def vae(channels: int = 4, blocks: int = 2, **options: Any) -> Any:
    """AutoencoderKL with 2 ** (blocks - 1) pixels per latent."""
    config = tiny.vae_config(channels, (8,) * (blocks - 1) + (16,))
    return diffusers.AutoencoderKL(**config, **options)


def clip(tokenizer: Any, projected: bool = False) -> Any:
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(tiny.clip_config(tokenizer))


def clip_vision(projected: bool = True, size: int = 32, patch: int = 16) -> Any:
    """CLIP's image encoder."""
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=patch, projection_dim=WIDTH,
    )  # fmt: skip
    name = "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"
    return getattr(transformers, name)(config)


def clip_images() -> Any:
    return transformers.CLIPImageProcessor(size=32, crop_size=32)


def siglip() -> dict[str, Any]:
    """Image encoder of 16 tokens and its processor."""
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return {
        "image_encoder": transformers.SiglipVisionModel(config),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


def t5(length: int = 16, width: int = WIDTH, number: str = "") -> dict[str, Any]:
    tokenizer = tiny.t5_tokenizer(length)
    return {f"text_encoder{number}": tiny.t5(tokenizer, width), f"tokenizer{number}": tokenizer}


def umt5(length: int = 64) -> dict[str, Any]:
    tokenizer = tiny.t5_tokenizer(length)
    classes = transformers.UMT5Config, transformers.UMT5EncoderModel
    return {"text_encoder": tiny.t5(tokenizer, WIDTH, *classes), "tokenizer": tokenizer}


def byte_vocabulary(*special: str) -> dict[str, int]:
    return {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}


def decoder(kind: str, tokenizer: Any, layers: int = 2, suffix: str = "Model", **own: Any) -> Any:
    """A language model of a kind of transformers: Llama, Gemma, Glm, Qwen3, ..."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
    }
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}{suffix}")(config)


def randomised(module: torch.nn.Module) -> None:
    """Draw all weights of two and more dimensions, of which some classes leave zeros or memory."""
    for values in module.parameters():
        if values.ndim > 1 and values.numel():
            torch.nn.init.normal_(values, std=values[0].numel() ** -0.5)
