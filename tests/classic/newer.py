"""Classes of PRX, Krea 2, ERNIE-Image, Ideogram 4 and Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

from tests import tiny, tiny_transformers
from tests.classic.hunyuan import guider
from tests.classic.parts import WIDTH, decoder, siglip, small
from tests.classic.qwen import VISION
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.tiny_transformers import DYNAMIC, flow, gemma_tokenizer, qwen_tokenizer

LANGUAGE = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def t5_gemma() -> dict[str, Any]:
    words = gemma_tokenizer()
    words.model_max_length = 64
    config = transformers.T5GemmaModuleConfig(vocab_size=len(words), dropout_rate=0.0, **LANGUAGE)
    return {"text_encoder": T5GemmaEncoder(config), "tokenizer": words}


def prx() -> dict[str, Any]:
    network = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=WIDTH, hidden_size=16, num_heads=2, depth=1,
        axes_dim=[4, 4],
    )  # fmt: skip
    return {**t5_gemma(), "transformer": network, "vae": tiny.flow_vae(4), "scheduler": flow()}


def prx_pixels() -> dict[str, Any]:
    words = qwen_tokenizer()
    network = diffusers.PRXTransformer2DModel(
        in_channels=3, context_in_dim=WIDTH, hidden_size=16, num_heads=2, depth=1,
        axes_dim=[4, 4], bottleneck_size=8, resolution_embeds=True,
    )  # fmt: skip
    encoder = decoder("Qwen3", words)
    return {"text_encoder": encoder, "tokenizer": words, "transformer": network,
            "scheduler": flow()}  # fmt: skip


def qwen3_vl(words: Any, layers: int = 2, kind: str = "Qwen3VLModel") -> Any:
    """Qwen3-VL with an image encoder of one block, which takes patches of 16 x 16 pixels."""
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2,
              "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}  # fmt: skip
    text = {**LANGUAGE, "num_hidden_layers": layers, "vocab_size": len(words)}
    marks = dict(zip(("vision_start", "vision_end", "image", "video"), VISION, strict=True))
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, kind)(config)


def krea2() -> dict[str, Any]:
    words = qwen_tokenizer()
    network = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=WIDTH,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return {
        "transformer": network,
        "vae": tiny_transformers.qwen_image().vae,
        "scheduler": flow(**DYNAMIC),
        "text_encoder": qwen3_vl(words),
        "tokenizer": words,
        "text_encoder_select_layers": (0, 1, 2),
    }


def flux2_vae() -> dict[str, Any]:
    parts = tiny_transformers.flux2().components
    return {name: parts[name] for name in ("vae", "tokenizer")}


def ernie() -> dict[str, Any]:
    parts = flux2_vae()
    network = small(
        "ErnieImageTransformer2DModel", patch_size=1, in_channels=16, out_channels=16,
        ffn_hidden_size=32, text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    encoder = decoder("Ministral3", parts["tokenizer"])
    return {**parts, "transformer": network, "text_encoder": encoder, "scheduler": flow()}


def ideogram4() -> dict[str, Any]:
    """Two networks, one for each branch."""
    parts = flux2_vae()
    settings = {
        "in_channels": 16, "intermediate_size": 32, "adaln_dim": 8,
        "llm_features_dim": 13 * WIDTH, "mrope_section": (4, 2, 2),
    }  # fmt: skip
    first, second = (small("Ideogram4Transformer2DModel", **settings) for _ in range(2))
    return {
        **parts,
        "text_encoder": qwen3_vl(parts["tokenizer"], 36),  # of which the class reads thirteen
        "transformer": first,
        "unconditional_transformer": second,
        "scheduler": flow(),
    }


def motif(seen: bool = False) -> dict[str, Any]:
    """`seen`: the encoder has an image encoder, and the network takes what it sees."""
    words = gemma_tokenizer()
    words.model_max_length = 64
    vision = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = transformers.T5Gemma2EncoderConfig(
        text_config={**LANGUAGE, "vocab_size": len(words), "dropout_rate": 0.0},
        vision_config=vision.to_dict(), mm_tokens_per_image=4,
    )  # fmt: skip
    network = small(
        "MotifVideoTransformer3DModel", in_channels=9, patch_size=1, rope_axes_dim=(4, 4, 8),
        image_embed_dim=WIDTH if seen else None,
    )  # fmt: skip
    return {
        "text_encoder": T5Gemma2Encoder(config),
        "tokenizer": words,
        "transformer": network,
        "vae": VAES["wan"](),
        "scheduler": flow(shift=7.0),
        "guider": guider(),
        "feature_extractor": siglip()["feature_extractor"],
    }


TINY = {
    "PRXPipeline": Recipe(prx),
    "PRXPixelPipeline": Recipe(prx_pixels),
    "Krea2Pipeline": Recipe(krea2, {"max_sequence_length": 16}),
    "ErnieImagePipeline": Recipe(ernie),
    "Ideogram4Pipeline": Recipe(ideogram4, {"guidance_schedule": None, "max_sequence_length": 64}),
    "MotifVideoPipeline": Recipe(motif, {"max_sequence_length": 16}),
    "MotifVideoImage2VideoPipeline": Recipe(lambda: motif(True), {"max_sequence_length": 16}),
}
