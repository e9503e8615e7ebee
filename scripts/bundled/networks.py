"""The parts of the bundled pipeline: built fresh, loaded, and saved without machine paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,  # pyright: ignore[reportPrivateImportUsage]
    DDIMScheduler,  # pyright: ignore[reportPrivateImportUsage]
    StableDiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sampler.bundled import FOLDER
from scripts.bundled.tokenizer import TEXT_LENGTH

MAIN_WIDTHS, WEAK_WIDTHS = (64, 128), (32, 64)
TEXT_WIDTH = 128


def new_vae() -> AutoencoderTiny:
    """Return an untrained f4 autoencoder with 4 latent channels (0.26 M parameters)."""
    widths = (32, 32, 32)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
    )


def new_unet(widths: tuple[int, int]) -> UNet2DConditionModel:
    """Return an untrained UNet on 16 x 16 x 4 latents: (64, 128) is 4.0 M, (32, 64) 1.0 M."""
    return UNet2DConditionModel(
        sample_size=16,  # pyright: ignore[reportArgumentType]
        block_out_channels=widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # pyright: ignore[reportArgumentType]
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # read by diffusers as the number of heads
        norm_num_groups=16,
    )


def text_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    """Return the configuration of a two-layer text encoder for the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: Any) -> CLIPTextModel:
    """Return an untrained text encoder."""
    return CLIPTextModel(text_config(tokenizer, TEXT_WIDTH))


def new_scheduler() -> DDIMScheduler:
    """Return the noise schedule: v-prediction, zero terminal SNR, trailing spacing."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def load_part(part: str, folder: Path, *, training: bool = False) -> Any:
    """Load a ``vae``, ``unet`` or ``text_encoder`` from its own folder, as float32."""
    if part == "text_encoder":
        kind = "eager" if training else "sdpa"
        return CLIPTextModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)
    classes: dict[str, Any] = {"vae": AutoencoderTiny, "unet": UNet2DConditionModel}
    module = classes[part].from_pretrained(folder, torch_dtype=torch.float32)
    if part == "unet" and training:
        plain_attention(module)
    return module


def plain_attention(unet: UNet2DConditionModel) -> None:
    """Use the matmul/softmax processor: its backward on a CPU is far cheaper than the fused one."""
    unet.set_attn_processor(AttnProcessor())


def load_pipeline(
    folder: Path = FOLDER / "pipeline", device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Load a pipeline folder into the stock class, its parts in float32."""
    return assembled(
        load_part("vae", folder / "vae"),
        load_part("text_encoder", folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        load_part("unet", folder / "unet"),
        DDIMScheduler.from_pretrained(folder / "scheduler"),
    ).to(device)


def assembled(
    vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any
) -> StableDiffusionPipeline:
    """Put parts together in the stock pipeline class, silent and without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_part(module: Any, folder: Path) -> None:
    """Write a network in fp16 safetensors, or a scheduler or tokenizer; drop local paths."""
    if isinstance(module, nn.Module):
        module = module.to(torch.float16)
    if isinstance(module, CLIPTokenizer):
        # Calls with padding leave their settings behind, and these would be written.
        module.backend_tokenizer.no_padding()
        module.backend_tokenizer.no_truncation()
    module.save_pretrained(folder)
    for path in folder.glob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
            config.pop(key, None)
        if isinstance(module, AutoencoderTiny):
            # Written by diffusers, which then warns of it at every load.
            config.pop("block_out_channels", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_index(folder: Path, pipeline: Any) -> None:
    """Write ``model_index.json`` of a pipeline whose parts lie in the folder."""
    pipeline.save_config(folder)
    path = folder / "model_index.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
