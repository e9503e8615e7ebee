"""Classes of Kandinsky 5: images and videos from texts and from images."""

from __future__ import annotations

from typing import Any

import diffusers

from tests import tiny, tiny_transformers
from tests.classic.parts import WIDTH, clip
from tests.classic.qwen import Sights, qwen_vl, tokenizer
from tests.classic.recipe import Recipe
from tests.classic.video_vaes import VAES
from tests.tiny_transformers import flow


def videos(conditioned: bool = False) -> dict[str, Any]:
    """`conditioned`: an image and its mask enter the network beside the noise."""
    words, second = tokenizer(), tiny.clip_tokenizer(77)
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4,
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
        visual_cond=conditioned,
    )  # fmt: skip
    return {
        "text_encoder": qwen_vl(words),
        "tokenizer": Sights(words),
        "text_encoder_2": clip(second),
        "tokenizer_2": second,
        "transformer": network,
        "vae": VAES["hunyuan"](),
        "scheduler": flow(shift=7.0),
    }


def images(conditioned: bool = False) -> dict[str, Any]:
    return {**videos(conditioned), "vae": tiny_transformers.deep_vae()}


TEXT = {"max_sequence_length": 64}
SMALL = {"resolutions": [(32, 32)]}  # the published ones have a megapixel
TINY = {
    "Kandinsky5T2VPipeline": Recipe(videos, {**TEXT, "num_frames": 5}),
    "Kandinsky5I2VPipeline": Recipe(
        lambda: videos(True),
        {**TEXT, "num_frames": 17},  # five latents: it scales four by the others
    ),
    "Kandinsky5T2IPipeline": Recipe(images, TEXT, constants=SMALL),
    "Kandinsky5I2IPipeline": Recipe(
        lambda: images(True), {"max_sequence_length": 512}, constants=SMALL
    ),
}
