"""Z-Image: one transformer over texts and patches that takes batches as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.families import adapter
from sampler.pipelines.flow import FlowTransformer, padded
from sampler.types import Cond, Level


@adapter("ZImagePipeline")
class ZImage(FlowTransformer):
    """Negative velocity prediction at times from 0 (noise) to 1.

    The stock pipeline's guidance_scale s means c + s·(c − u): our scale minus one.
    """

    _lengths_of: tuple[Tensor | None, list[int]] = (None, [])  # the last mask and its lengths

    def stock_times(self, steps: int) -> list[float] | None:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    @property
    def default_scale(self) -> float:
        return super().default_scale + 1

    @property
    def patch(self) -> int:
        return 2

    @property
    def native(self) -> tuple[int, int]:
        return 1024 // self.factor, 1024 // self.factor

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        states, uncond = self.encode_prompt(
            list(prompts), self.device, guided, negative_prompt=list(negative)
        )
        return Cond(_texts(states), _texts(uncond) if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        time = (1000 - self.row_times(level, x)) / 1000
        samples = list(self.scaled(x, level)[:, :, None].unbind())
        texts = zip(cond["states"], self._lengths(cond["mask"]), strict=True)
        states = [states[:length] for states, length in texts]
        outs = self.networks[model](samples, time, states, return_dict=False)[0]
        return -torch.stack(list(outs))[:, :, 0]

    def stock_texts(self, cond: Any) -> dict[str, Any]:
        texts = zip(cond["states"], cond["mask"].sum(1).tolist(), strict=True)
        return {"cap_feats": [states[:length] for states, length in texts]}

    def _lengths(self, mask: Tensor) -> list[int]:
        """Lengths of the texts, cached: reading them from a device blocks the host."""
        cached, lengths = self._lengths_of
        if cached is not mask:
            lengths = mask.sum(1).tolist()
            self._lengths_of = (mask, lengths)
        return lengths


def _texts(states: list[Tensor]) -> dict[str, Tensor]:
    stacked, mask = padded(states)
    return {"states": stacked, "mask": mask}
