"""Tiny autoencoders of videos, by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tests.tiny import STATISTICS

NARROW = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1}


def four(down: str, up: str) -> dict[str, Any]:
    return {"down_block_types": (down,) * 4, "up_block_types": (up,) * 4}


def wan() -> Any:
    """2 pixels and 2 frames per latent."""
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        **STATISTICS, scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip


def wan16() -> Any:
    """The published layout: 16 channels, 8 pixels and 4 frames per latent."""
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip


def hunyuan() -> Any:
    blocks = four("HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D")
    return diffusers.AutoencoderKLHunyuanVideo(**NARROW, **blocks, norm_num_groups=4)


def cogvideo() -> Any:
    blocks = four("CogVideoXDownBlock3D", "CogVideoXUpBlock3D")
    return diffusers.AutoencoderKLCogVideoX(**NARROW, **blocks, norm_num_groups=2)


def allegro() -> Any:
    blocks = four("AllegroDownBlock3D", "AllegroUpBlock3D")
    return diffusers.AutoencoderKLAllegro(**NARROW, **blocks, norm_num_groups=2)


def magvit() -> Any:
    down = ("SpatialDownBlock3D",) + 3 * ("SpatialTemporalDownBlock3D",)
    up = ("SpatialUpBlock3D",) + 3 * ("SpatialTemporalUpBlock3D",)
    return diffusers.AutoencoderKLMagvit(
        **NARROW, down_block_types=down, up_block_types=up, norm_num_groups=2,
        spatial_group_norm=False,
    )  # fmt: skip


def mochi() -> Any:
    return diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip


def ltx() -> Any:
    found = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    found.use_framewise_encoding = found.use_framewise_decoding = False
    return found


def cosmos() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip


VAES: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "wan16": wan16,
    "hunyuan": hunyuan,
    "cogvideo": cogvideo,
    "allegro": allegro,
    "magvit": magvit,
    "mochi": mochi,
    "ltx": ltx,
    "cosmos": cosmos,
}
