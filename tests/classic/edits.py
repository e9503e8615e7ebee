"""Classes that edit images which a multimodal language model sees beside the prompt."""

from __future__ import annotations

from typing import Any

from tests import tiny_transformers
from tests.classic.parts import WIDTH
from tests.classic.qwen import Sights, longcat, qwen_vl, tokenizer
from tests.classic.recipe import Recipe
from tests.tiny import qwen_transformer


def qwen_edit() -> dict[str, Any]:
    words, parts = tokenizer(), tiny_transformers.qwen_image().components
    network = qwen_transformer()
    own = {**network.config, "joint_attention_dim": WIDTH}
    return {
        **parts,
        "transformer": type(network).from_config(own),
        "tokenizer": words,
        "text_encoder": qwen_vl(words),
        "processor": Sights(words),
    }


def longcat_edit() -> dict[str, Any]:
    parts = longcat()
    return {**parts, "text_processor": Sights(parts["tokenizer"])}


TINY = {
    "QwenImageEditPipeline": Recipe(qwen_edit),
    "QwenImageEditInpaintPipeline": Recipe(qwen_edit),
    "QwenImageEditPlusPipeline": Recipe(qwen_edit),
    "LongCatImageEditPipeline": Recipe(longcat_edit),
}
