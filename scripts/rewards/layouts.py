"""The original layouts of HPSv2 (open_clip) and ImageReward (Salesforce BLIP), key by key.

Every function maps a state dict to the names that transformers uses, and refuses unknown keys.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# Attention heads cannot be read off shapes: widths of a head in the published networks.
CLIP_HEADS = {"vision": 80, "text": 64}
BLIP_HEAD = 64


def matched(state: State, wanted: dict[str, Any], name: str) -> State:
    """`state` in float32, if its keys and shapes are those of `wanted`. Raises ValueError."""
    if missing := sorted(set(wanted) - set(state)):
        raise ValueError(f"no {name}: {len(missing)} keys are missing, such as {missing[0]}.")
    if extra := sorted(set(state) - set(wanted)):
        raise ValueError(f"no {name}: {len(extra)} keys are unknown, such as {extra[0]}.")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            shapes = f"{tuple(state[key].shape)} instead of {tuple(value.shape)}"
            raise ValueError(f"no {name}: {key} is {shapes}.")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}


def open_clip(state: State) -> tuple[State, dict[str, Any]]:
    """open_clip's state dict under the names of transformers' CLIPModel, and its configuration."""
    out: State = {}
    for key, value in state.items():
        if key in ("attn_mask", "logit_bias"):  # buffers that carry no weights
            continue
        if key in ("visual.proj", "text_projection"):
            name = "visual_projection" if key.startswith("visual") else "text_projection"
            out[f"{name}.weight"] = value.T
            continue
        stem, _, leaf = key.rpartition(".")
        if key in _CLIP_NAMES or stem in _CLIP_NAMES:
            out[_CLIP_NAMES.get(key) or f"{_CLIP_NAMES[stem]}.{leaf}"] = value
            continue
        found = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
        if found is None:
            raise ValueError(f"no open_clip checkpoint: the key {key} is unknown.")
        tower = "vision_model" if found[1] else "text_model"
        out.update(_clip_block(f"{tower}.encoder.layers.{found[2]}", found[3], value))
    if "text_projection.weight" not in out or "visual_projection.weight" not in out:
        raise ValueError("no open_clip checkpoint: its projections are missing.")
    return out, _clip_config(out)


def _clip_block(prefix: str, name: str, value: Tensor) -> State:
    if name.startswith("attn.in_proj_"):
        leaf = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{p}_proj.{leaf}": part for p, part in parts}
    stem, _, leaf = name.rpartition(".")
    if stem not in _BLOCK:
        raise ValueError(f"no open_clip checkpoint: the block has an unknown part {name}.")
    return {f"{prefix}.{_BLOCK[stem]}.{leaf}": value}


def _tower(state: State, layers: str, mlp: str) -> dict[str, int]:
    """Width, inner width and depth of the blocks named layers + "0", layers + "1", ..."""
    blocks = {k.removeprefix(layers).split(".")[0] for k in state if k.startswith(layers)}
    inner, width = state[f"{layers}0.{mlp}.weight"].shape
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(blocks)}


def _clip_config(state: State) -> dict[str, Any]:
    vision = _tower(state, "vision_model.encoder.layers.", "mlp.fc1")
    text = _tower(state, "text_model.encoder.layers.", "mlp.fc1")
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    cells = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    words = state["text_model.embeddings.token_embedding.weight"].shape[0]
    size = state["visual_projection.weight"].shape[0]
    common = {"hidden_act": "gelu", "projection_dim": size}
    heads = {
        n: max(1, t["hidden_size"] // CLIP_HEADS[n])
        for n, t in (("vision", vision), ("text", text))
    }
    return {
        "projection_dim": size,
        "vision_config": vision
        | common
        | {
            "patch_size": patch,
            "image_size": patch * round(cells**0.5),
            "num_attention_heads": heads["vision"],
        },
        "text_config": text
        | common
        | {
            "vocab_size": words,
            "num_attention_heads": heads["text"],
            "max_position_embeddings": state[
                "text_model.embeddings.position_embedding.weight"
            ].shape[0],
            # open_clip pools at the token with the largest number, the end of the text
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": 0,
        },
    }


_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def blip(state: State) -> tuple[State, dict[str, Any]]:
    """ImageReward's state dict under the names of `sampler.rewards.encoders.Blip`, and config."""
    out: State = {}
    for key, value in state.items():
        if key.endswith("position_ids"):  # a buffer 0, 1, 2, ...
            continue
        if key.startswith("blip.text_encoder."):
            out["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp."):
            out[key] = value
        elif key.startswith("blip.visual_encoder."):
            out["vision." + _blip_vision(key.removeprefix("blip.visual_encoder."))] = value
        else:
            raise ValueError(f"no ImageReward checkpoint: the key {key} is unknown.")
    config = _blip_config(out)
    return matched(out, _blip_shapes(config), "ImageReward checkpoint"), config


def _blip_vision(key: str) -> str:
    stem, _, leaf = key.rpartition(".")
    if key in _VISION_NAMES or stem in _VISION_NAMES:
        return _VISION_NAMES.get(key) or f"{_VISION_NAMES[stem]}.{leaf}"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if found is None or found[2] not in _VISION_BLOCK:
        raise ValueError(
            f"no ImageReward checkpoint: the key blip.visual_encoder.{key} is unknown."
        )
    return f"encoder.layers.{found[1]}.{_VISION_BLOCK[found[2]]}.{leaf}"


def _blip_config(state: State) -> dict[str, Any]:
    try:
        vision = _tower(state, "vision.encoder.layers.", "mlp.fc1")
        text = _tower(state, "text.encoder.layer.", "intermediate.dense")
        patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
        cells = state["vision.embeddings.position_embedding"].shape[1] - 1
        words = state["text.embeddings.word_embeddings.weight"].shape[0]
        places = state["text.embeddings.position_embeddings.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"no ImageReward checkpoint: {error.args[0]} is missing.") from None
    return {
        "vision": vision
        | {
            "patch_size": patch,
            "image_size": patch * round(cells**0.5),
            "num_attention_heads": max(1, vision["hidden_size"] // BLIP_HEAD),
            "layer_norm_eps": 1e-6,
        },
        "text": text
        | {
            "num_attention_heads": max(1, text["hidden_size"] // BLIP_HEAD),
            "encoder_hidden_size": vision["hidden_size"],
            "vocab_size": words,
            "max_position_embeddings": places,
            "is_decoder": True,
        },
    }


def _blip_shapes(config: dict[str, Any]) -> dict[str, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from sampler.rewards.heads import ScoreHead

    with torch.device("meta"):
        parts = {
            "vision": BlipVisionModel(BlipVisionConfig(**config["vision"])),
            "text": BlipTextModel(BlipTextConfig(**config["text"]), add_pooling_layer=False),
            "mlp": ScoreHead(config["text"]["hidden_size"]),
        }
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
        if not key.endswith("position_ids")
    }
