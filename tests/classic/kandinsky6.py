"""Kandinsky 6: videos with sound."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.classic.kandinsky5 import videos
from tests.classic.parts import WIDTH
from tests.classic.qwen import Texts
from tests.classic.recipe import Recipe


def kandinsky6() -> dict[str, Any]:
    """Its autoencoder is that of Kandinsky 5; the processor is given no image."""
    parts = videos()
    network = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16,
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
        visual_token_type_num_embeddings=2, in_audio_dim=4, out_audio_dim=4,
        text_token_padding=True,
    )  # fmt: skip
    return {
        **parts,
        "tokenizer": Texts(parts["tokenizer"].tokenizer),
        "transformer": network,
        "audio_vae": diffusers.MMAudioVAE(
            mel_bins=16, latent_channels=4, hidden_channels=16, layers_per_block=1, n_fft=64,
            hop_length=32,
        ),
        "vocoder": diffusers.MMAudioVocoder(
            num_mels=16, upsample_initial_channel=64, upsample_rates=(8, 4),
            upsample_kernel_sizes=(16, 8),
        ),
    }  # fmt: skip


TINY = {
    "Kandinsky6TI2VAPipeline": Recipe(
        kandinsky6, {"max_sequence_length": 64, "num_frames": 5, "output_type": "latent"}
    )
}
