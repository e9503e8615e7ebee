"""Flux: T5 states and a pooled CLIP embedding beside packed 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer, pack, unpack
from sampler.types import Cond, Level


@adapter("FluxPipeline")
class Flux(FlowTransformer):
    """Velocity prediction at times 0..1 on packed tokens with rotary positions.

    A distilled network (`guidance_embeds`) takes a guidance scale as input in every branch: that of
    the rule "embedded", which is the default, or `embedded_scale`. Rules with an unconditional
    branch, such as `cfg`, are the stock pipeline's "true" CFG, on top of it.
    """

    scale_argument = "true_cfg_scale"
    text_tokens = (("tokenizer_2", 0),)

    def stock_times(self, steps: int) -> list[float] | None:
        return None if self.schedule.open_end else self.linear_times(steps)

    @property
    def patch(self) -> int:
        return 2

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels = self.network.config.in_channels // 4
        return (channels, height // self.factor, width // self.factor)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        return self.branches(self._texts(prompts), self._texts(negative) if guided else None)

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states, pooled, _ = self.encode_prompt(list(texts), None, device=self.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        tokens = pack(self.scaled(x, level))
        out = self.networks[model](
            tokens,
            timestep=self.row_times(level, x).to(tokens.dtype) / 1000,
            img_ids=_positions(x.shape[2] // 2, x.shape[3] // 2, tokens),
            txt_ids=tokens.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **cond,
        )[0]
        return unpack(out, x.shape)


def _positions(rows: int, cols: int, like: Tensor) -> Tensor:
    """[rows·cols, 3]: 0, row and column of each token."""
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    return torch.nn.functional.pad(positions, (1, 0)).to(like)
