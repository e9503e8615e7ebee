"""The autoencoder stage and the two UNet stages of the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.bundled.emoji_data import EmojiData, generator
from scripts.bundled.networks import new_scheduler, plain_attention

CACHED = 1_000_081
"""Added to the training seed for the cached latents' composites."""
GRID = 32
"""Pictures of a grid, which shows what is learnt."""
MEASURED = 1024
"""Composites whose latents decide the scaling factor."""


class VaeTask:
    """Reconstruction with a gradient term; the decoder sees slightly noisy latents."""

    def __init__(self, data: EmojiData, vae: AutoencoderTiny, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.device = data.sprites.device
        self.modules = nn.ModuleDict({"vae": nn.Module.to(vae, self.device)})

    def loss(self, step: int) -> Tensor:
        """Return |e| + e^2 + 0.5 (|dx e| + |dy e|) + 0.05 L_z, each a mean; e = y - x."""
        images = self.data.batch(self.batch_size, self.seed, step).images
        vae: Any = self.modules["vae"]
        draw = generator(self.seed, step, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            latents = vae.encode(images).latents
            noise = torch.randn(latents.shape, generator=draw).to(latents)
            decoded = vae.decode(latents + 0.06 * noise).sample
        error, latents = decoded.float() - images, latents.float()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        # The soft bound on |z| stands in for a KL term.
        bound = (latents.abs() - 1.5).clamp_min(0).square().mean() + 0.02 * latents.square().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 0.05 * bound

    @torch.no_grad()
    def pictures(self, modules: nn.ModuleDict) -> Tensor | None:
        """Return reconstructions of `GRID` composites."""
        images = self.data.batch(GRID, self.seed, 0, 2).images
        vae: Any = modules["vae"]
        return (vae.decode(vae.encode(images).latents).sample + 1) / 2


@torch.no_grad()
def latent_scale(vae: AutoencoderTiny, data: EmojiData, seed: int) -> float:
    """Return 1 / std of the latents of `MEASURED` composites: the pipeline's scaling factor."""
    size = min(256, MEASURED)
    keys = range(MEASURED // size)
    latents = [vae.encode(data.batch(size, seed, i, 3).images).latents for i in keys]  # pyright: ignore[reportAttributeAccessIssue]
    return float(1 / torch.cat(latents).std())


def grid_captions(data: EmojiData) -> list[str]:
    """Return captions for a grid, of concepts at even distances."""
    named = [f"a {name} on a blue background" for name in data.concepts]
    return named[:: max(1, len(named) // GRID)][:GRID]


class Latents:
    """Encoded composites with their classes; captions are drawn anew at every visit.

    ``latents`` is float16 [N, 4, 16, 16], already times the scaling factor; ``classes`` int64
    [N, 3] holds concept, style, background. A file at ``path`` with the same identity is reused.
    """

    def __init__(
        self, data: EmojiData, vae: AutoencoderTiny, count: int, seed: int, path: Path
    ) -> None:
        probe = float(sum(p.detach().double().abs().sum() for p in vae.parameters()))
        identity = json.dumps({"count": count, "seed": seed, "vae": probe})
        if not (path.exists() and self._identity(path) == identity):
            self._write(data, vae, count, seed, path, identity)
        with safe_open(path, "pt") as stored:
            self.latents = stored.get_tensor("latents")
            self.classes = stored.get_tensor("classes")
        self.data = data

    @staticmethod
    def _identity(path: Path) -> str | None:
        with safe_open(path, "pt") as stored:
            return (stored.metadata() or {}).get("identity")

    @staticmethod
    @torch.no_grad()
    def _write(
        data: EmojiData, vae: AutoencoderTiny, count: int, seed: int, path: Path, identity: str
    ) -> None:
        latents, classes = [], []
        scale = vae.config["scaling_factor"]
        for index in track(range(-(-count // 64)), "latents"):
            batch = data.batch(64, seed + CACHED, index)
            latents.append((vae.encode(batch.images).latents * scale).half().cpu())  # pyright: ignore[reportAttributeAccessIssue]
            labels = [batch.concept, batch.style, batch.background]
            classes.append(torch.stack(labels, 1).cpu())
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        tensors = {"latents": torch.cat(latents)[:count], "classes": torch.cat(classes)[:count]}
        save_file(tensors, temporary, {"identity": identity})
        temporary.rename(path)

    def batch(self, count: int, *key: int) -> tuple[Tensor, list[str]]:
        """Return latents [B, 4, 16, 16] float32 and freshly drawn captions, fixed by the key."""
        draw = generator(*key)
        chosen = torch.randint(len(self.latents), (count,), generator=draw)
        words = torch.rand(count, 5, generator=draw).tolist()
        rows = self.classes[chosen].tolist()
        captions = [
            self.data.caption(concept, style, background, word)
            for (concept, style, background), word in zip(rows, words, strict=True)
        ]
        return self.latents[chosen].float().to(self.data.sprites.device), captions


class UnetTask:
    """v-prediction on cached latents; the text encoder learns too unless it is frozen.

    Target v = sqrt(ab) eps - sqrt(1 - ab) x0, loss weight min(SNR + 1, 5) / (SNR + 1), which
    is min-SNR weighting written for v (Salimans and Ho 2202.00512, Hang et al. 2303.09556).
    """

    def __init__(
        self,
        latents: Latents,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        batch_size: int,
        seed: int,
        *,
        freeze_text: bool = False,
        draw: Callable[[nn.ModuleDict], Tensor] | None = None,
    ) -> None:
        self.latents, self.tokenizer, self.draw = latents, tokenizer, draw
        self.batch_size, self.seed, self.freeze_text = batch_size, seed, freeze_text
        self.device = latents.data.sprites.device
        plain_attention(unet)
        self.text_encoder = text_encoder.to(self.device)  # pyright: ignore[reportArgumentType]
        parts: dict[str, nn.Module] = {"unet": unet.to(self.device)}  # pyright: ignore[reportArgumentType]
        if freeze_text:
            self.text_encoder.eval().requires_grad_(False)
        else:
            parts["text_encoder"] = self.text_encoder
        self.modules = nn.ModuleDict(parts)
        self.alpha_bar = new_scheduler().alphas_cumprod.to(self.device)

    def tokens(self, captions: list[str]) -> Tensor:
        """Return token ids [B, 16], padded as the stock pipeline pads them."""
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device)

    def loss(self, step: int) -> Tensor:
        """Return the weighted mean squared error of the predicted v."""
        clean, captions = self.latents.batch(self.batch_size, self.seed, step)
        draw = generator(self.seed, step, 1)
        noise = torch.randn(clean.shape, generator=draw).to(self.device)
        times = torch.randint(1000, (len(clean),), generator=draw).to(self.device)
        alpha_bar = self.alpha_bar[times][:, None, None, None]
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        with torch.autocast(self.device.type, torch.bfloat16):
            context = self.text_encoder(self.tokens(captions))[0]
            output = self.modules["unet"](signal * clean + sigma * noise, times, context).sample
        error = output.float() - (signal * noise - sigma * clean)
        # SNR + 1 = 1 / (1 - ab), so the weight needs no division at ab = 1.
        weight = torch.minimum(torch.ones_like(alpha_bar), 5 * (1 - alpha_bar))
        return (weight * error.square()).mean()

    def pictures(self, modules: nn.ModuleDict) -> Tensor | None:
        """Return what ``draw`` makes of the averaged modules."""
        return None if self.draw is None else self.draw(modules)
