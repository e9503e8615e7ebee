"""Classes of AltDiffusion: Stable Diffusion with a multilingual encoder."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as series

from tests import tiny
from tests.classic.audio import roberta
from tests.classic.parts import WIDTH
from tests.classic.recipe import Recipe


def alt() -> dict[str, Any]:
    words = roberta()
    config = series.RobertaSeriesConfig(
        hidden_size=WIDTH, project_dim=WIDTH, intermediate_size=32, num_attention_heads=2,
        num_hidden_layers=2, vocab_size=len(words), pad_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    encoder = series.RobertaSeriesModelWithTransformation(config)
    return {**tiny.sd().components, "text_encoder": encoder, "tokenizer": words}


TINY = {
    "AltDiffusionPipeline": Recipe(alt),
    "AltDiffusionImg2ImgPipeline": Recipe(alt),
}
