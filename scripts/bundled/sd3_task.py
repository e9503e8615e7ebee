"""The small SD3: its parts, and their training towards the bundled model's velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,  # pyright: ignore[reportPrivateImportUsage]
    SD3Transformer2DModel,  # pyright: ignore[reportPrivateImportUsage]
    StableDiffusion3Pipeline,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from sampler.bundled import FOLDER
from sampler.pipelines.flow_view import FlowView
from sampler.types import Level
from scripts.bundled.emoji_data import generator
from scripts.bundled.networks import text_config
from scripts.bundled.tasks import Latents

WIDTH, ENCODER_WIDTH = 128, 64
T5_LENGTH = 256
"""Zero tokens that the stock pipeline appends where it has no T5 encoder (max_sequence_length)."""


def new_transformer() -> SD3Transformer2DModel:
    """Return an untrained MMDiT of 2.3 M parameters on 16 x 16 x 4 latents, patches of 2 x 2.

    The modulations and the output start at zero (Peebles and Xie 2212.09748, section 3.2).
    """
    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=2 * ENCODER_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * ENCODER_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in network.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    return network


def new_text_encoder(tokenizer: Any) -> CLIPTextModelWithProjection:
    """Return one of the two untrained text encoders: two layers of width 64."""
    config = text_config(tokenizer, ENCODER_WIDTH)
    return CLIPTextModelWithProjection._from_config(config, attn_implementation="eager")


class RepeatedTokenAttention:
    """Joint attention of SD3 whose last context token stands for ``count`` equal ones.

    Equal tokens without positions stay equal in every layer, so their keys add log(count) to one
    key's logit: softmax(q·K + log n) is exact, at 1 token instead of ``count``. Plain matmul and
    softmax: their backward on a CPU is cheaper than the fused kernel's.
    """

    def __init__(self, count: int = T5_LENGTH) -> None:
        self.bias = math.log(count)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the attended image tokens [B, N, C] and context tokens [B, T, C]."""

        def heads(states: Tensor, norm: Any = None) -> Tensor:
            split = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        x, c = hidden_states, encoder_hidden_states
        query = torch.cat(
            [heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(c), attn.norm_added_q)], 2
        )
        key = torch.cat(
            [heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(c), attn.norm_added_k)], 2
        )
        value = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], 2)
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        logits[..., -1] += self.bias
        mixed = (logits.softmax(-1).to(value) @ value).transpose(1, 2).flatten(2)
        image, context = mixed.split([x.shape[1], c.shape[1]], 1)
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](image), context


def load_sd3(folder: Path = FOLDER / "sd3") -> StableDiffusion3Pipeline:
    """Load the folder into the stock class, in float32; it has no T5 encoder."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assembled_sd3(parts: dict[str, Any], vae: Any, tokenizer: Any) -> StableDiffusion3Pipeline:
    """Put the parts together in the stock class, silent, without a T5 encoder."""
    pipeline = StableDiffusion3Pipeline(
        transformer=parts["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=parts["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=parts["text_encoder_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]
        tokenizer_3=None,  # pyright: ignore[reportArgumentType]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Sd3Task:
    """Velocity matching on cached latents, towards the velocity of a trained model.

    x = (1 - sigma) x0 + sigma eps with sigma = sigmoid(N(0, 1)); loss |v(x, sigma) - v_T|^2, a
    mean. v_T is the teacher's mean of eps - x0 given x and the caption. For a perfect teacher the
    minimum is that of the loss on eps - x0, and the target has no noise of the draw.
    """

    def __init__(
        self,
        latents: Latents,
        parts: dict[str, nn.Module],
        teacher: Any,
        tokenizer: Any,
        batch_size: int,
        seed: int,
        *,
        draw: Callable[[nn.ModuleDict], Tensor] | None = None,
    ) -> None:
        self.latents, self.tokenizer = latents, tokenizer
        self.batch_size, self.seed, self.draw = batch_size, seed, draw
        self.device = latents.data.sprites.device
        self.modules = nn.ModuleDict(parts).to(self.device)
        for part in (teacher.unet, teacher.text_encoder):
            part.to(self.device).eval().requires_grad_(False)
        self.view = FlowView(teacher)

    def tokens(self, captions: list[str]) -> Tensor:
        """Return token ids [B, 16], padded as both stock pipelines pad them."""
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device)

    def context(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two encoders' states with one zero token [B, 17, 128], and pooled [B, 128]."""
        outputs: list[Any] = [
            self.modules[name](ids, output_hidden_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        return torch.cat([states, states.new_zeros(len(ids), 1, states.shape[-1])], 1), pooled

    @torch.no_grad()
    def target(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Return the teacher's mean of eps - x0 given x, at flow levels sigma [B, 1, 1, 1]."""
        states = self.view.pipe.text_encoder(ids)[0]
        level = Level(0.0, 1 - sigma, sigma)
        return self.view.forward(x, level, {"encoder_hidden_states": states}, "main").float()

    def loss(self, step: int) -> Tensor:
        """Return the mean squared error of the velocity of batch ``step``."""
        clean, captions = self.latents.batch(self.batch_size, self.seed, step)
        draw = generator(self.seed, step, 1)
        noise = torch.randn(clean.shape, generator=draw).to(self.device)
        sigma = torch.randn(len(clean), 1, 1, 1, generator=draw).to(self.device).sigmoid()
        x, ids = (1 - sigma) * clean + sigma * noise, self.tokens(captions)
        with torch.autocast(self.device.type, torch.bfloat16):
            states, pooled = self.context(ids)
            output = self.modules["transformer"](
                hidden_states=x,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=1000 * sigma.flatten(),
            ).sample
            target = self.target(x, sigma, ids)
        return (output.float() - target).square().mean()

    def pictures(self, modules: nn.ModuleDict) -> Tensor | None:
        """Return what ``draw`` makes of the averaged modules."""
        return None if self.draw is None else self.draw(modules)
