"""Classes whose texts are encoded by Qwen2.5-VL or another multimodal language model."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests import tiny
from tests.classic.flux import PACKED
from tests.classic.parts import WIDTH, clip, decoder, small
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.tiny_transformers import flow, qwen_tokenizer

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tokenizer() -> Any:
    found = qwen_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *VISION]})
    return found


def qwen_vl(words: Any) -> Any:
    """Qwen2.5-VL with an image encoder of one block."""
    marks = dict(zip(("vision_start", "vision_end", "image", "video"), VISION, strict=True))
    text = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(words),
        "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2,
              "out_hidden_size": WIDTH}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision,
        **{f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


class Texts:
    """A processor of texts alone: that of Qwen2-VL needs torchvision for its videos."""

    def __init__(self, words: Any) -> None:
        self.tokenizer = words

    def __call__(self, text: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        assert images is None and videos is None
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def qwen(**more: Any) -> dict[str, Any]:
    words = tokenizer()
    return {"tokenizer": words, "text_encoder": qwen_vl(words), "text_processor": Texts(words),
            **more}  # fmt: skip


def longcat() -> dict[str, Any]:
    network = small("LongCatImageTransformer2DModel", **{**PACKED, "in_channels": 64})
    scheduler = flow(use_dynamic_shifting=True)
    return qwen(transformer=network, vae=tiny.flow_vae(16), scheduler=scheduler)


def kandinsky5() -> dict[str, Any]:
    words, second = tokenizer(), tiny.clip_tokenizer(77)
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4,
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return {
        "text_encoder": qwen_vl(words),
        "tokenizer": Texts(words),
        "text_encoder_2": clip(second),
        "tokenizer_2": second,
        "transformer": network,
        "vae": VAES["hunyuan"](),
        "scheduler": flow(shift=7.0),
    }


def easy_animate() -> dict[str, Any]:
    words = qwen_tokenizer()
    network = small(
        "EasyAnimateTransformer3DModel", time_embed_dim=2,
        text_embed_dim=WIDTH, sample_width=16, sample_height=16,
    )  # fmt: skip
    return {
        "text_encoder": decoder("Qwen2", words),
        "tokenizer": words,
        "transformer": network,
        "vae": VAES["magvit"](),
        "scheduler": flow(),
    }


def bria_fibo() -> dict[str, Any]:
    words = qwen_tokenizer()
    network = small(
        "BriaFiboTransformer2DModel", patch_size=1, in_channels=4, axes_dims_rope=(4, 4, 8),
        text_encoder_dim=WIDTH, joint_attention_dim=2 * WIDTH, pooled_projection_dim=None,
    )  # fmt: skip
    encoder = decoder("SmolLM3", words, 2, "ForCausalLM")
    return {"tokenizer": words, "text_encoder": encoder, "transformer": network,
            "vae": VAES["wan"](), "scheduler": flow(use_dynamic_shifting=True)}  # fmt: skip


TEXT = {"max_sequence_length": 64}
CLIP5 = {**TEXT, "num_frames": 5}
TINY = {
    "LongCatImagePipeline": Recipe(
        longcat, {"enable_cfg_renorm": False, "enable_prompt_rewrite": False}
    ),
    "Kandinsky5T2VPipeline": Recipe(kandinsky5, CLIP5),
    "EasyAnimatePipeline": Recipe(easy_animate),
    "BriaFiboPipeline": Recipe(bria_fibo, TEXT),
}
