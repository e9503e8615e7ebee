"""GLM-Image, whose image tokens a language model draws before its network is called."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.classic.parts import WIDTH, small, vae
from tests.classic.recipe import Recipe
from tests.tiny import STATISTICS, t5
from tests.tiny_transformers import flow

CODES = 32  # of image tokens
PIXELS = 32  # on a side of an image token


class Turns:
    """A processor of conversations: the bytes of their texts, and the grids of their images."""

    def apply_chat_template(
        self, conversations: Any, target_h: int, target_w: int, **_: Any
    ) -> transformers.BatchEncoding:
        sizes = [
            one["image"].size[::-1]
            for one in conversations[0][0]["content"]
            if one["type"] == "image"
        ]
        texts = [turns[0]["content"][-1]["text"].encode() for turns in conversations]
        rows = torch.tensor([[*text.ljust(32)[:32]] for text in texts])
        grids = torch.tensor(
            [[1, h // PIXELS, w // PIXELS] for h, w in [*sizes, (target_h, target_w)]]
        )
        grids = grids.repeat(len(texts), 1)
        counts = torch.full((len(texts),), len(sizes) + 1)
        found = {"input_ids": rows, "image_grid_thw": grids, "images_per_sample": counts}
        return transformers.BatchEncoding({**found, "pixel_values": None})


class Draws(torch.nn.Module):
    """A language model that draws image tokens at random, from torch's own generator."""

    device, dtype = torch.device("cpu"), torch.float32

    def generate(
        self, input_ids: Any, max_new_tokens: int, do_sample: bool = False, **_: Any
    ) -> torch.Tensor:
        assert do_sample
        shape = len(input_ids), max_new_tokens
        return torch.cat([input_ids, torch.randint(CODES, shape)], 1)

    def get_image_features(self, _: Any, grids: torch.Tensor) -> Any:
        sizes = grids.prod(1).tolist()
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            pooler_output=tuple(torch.ones(size, 1) for size in sizes)
        )

    def get_image_tokens(self, embeddings: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.arange(len(embeddings)) % CODES


def glm_image() -> dict[str, Any]:
    words = transformers.ByT5Tokenizer()
    network = small(
        "GlmImageTransformer2DModel", text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )  # fmt: skip
    return {
        "tokenizer": words,
        "processor": Turns(),
        "text_encoder": t5(words, WIDTH),
        "vision_language_encoder": Draws(),
        "vae": vae(4, 4, **STATISTICS),
        "transformer": network,
        "scheduler": flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    }


SIZE = {"height": 32, "width": 32}
TINY = {"GlmImagePipeline": Recipe(glm_image, {**SIZE, "image": ...})}
