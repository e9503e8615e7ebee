"""Classes whose texts are encoded by Qwen2.5-VL or another multimodal language model."""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from tests import tiny
from tests.classic.flux import PACKED
from tests.classic.parts import WIDTH, decoder, small
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


class Sights(Texts):
    """A processor of texts and images, of which each image token of a text becomes several."""

    image_token = "<|image_pad|>"

    def __init__(self, words: Any, patch: int = 14) -> None:
        super().__init__(words)
        self.image_processor = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
            min_pixels=4 * patch**2, max_pixels=16 * patch**2, patch_size=patch
        )
        self.image_token_id = words.convert_tokens_to_ids(self.image_token)

    def __call__(self, text: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        if images is None:
            return super().__call__(text, None, videos, **options)
        seen = self.image_processor(images=images, return_tensors="pt")
        patches = seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        counts = iter(patches.tolist())

        def filled(_: Any) -> str:
            return self.image_token * next(counts)

        texts = [text] if isinstance(text, str) else text
        texts = [re.sub(re.escape(self.image_token), filled, one) for one in texts]
        found = self.tokenizer(texts, **{"return_tensors": "pt", **options})
        kinds = (found["input_ids"] == self.image_token_id).long()
        return transformers.BatchEncoding({**found, **seen, "mm_token_type_ids": kinds})


def qwen(**more: Any) -> dict[str, Any]:
    words = tokenizer()
    return {"tokenizer": words, "text_encoder": qwen_vl(words), "text_processor": Texts(words),
            **more}  # fmt: skip


def longcat() -> dict[str, Any]:
    network = small("LongCatImageTransformer2DModel", **{**PACKED, "in_channels": 64})
    scheduler = flow(use_dynamic_shifting=True)
    return qwen(transformer=network, vae=tiny.flow_vae(16), scheduler=scheduler)


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
TINY = {
    "LongCatImagePipeline": Recipe(
        longcat, {"enable_cfg_renorm": False, "enable_prompt_rewrite": False}
    ),
    "EasyAnimatePipeline": Recipe(easy_animate),
    "BriaFiboPipeline": Recipe(bria_fibo, TEXT),
}
