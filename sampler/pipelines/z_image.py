"""Z-Image: one transformer over texts and patches, with a list of samples as its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.base import adapter
from sampler.pipelines.flow import FlowTransformer, padded
from sampler.types import Cond, Level


@adapter("ZImagePipeline")
class ZImage(FlowTransformer):
    """The network's clock runs from 0 (noise) to 1, and its output is the negative velocity.

    The stock pipeline's guidance_scale s means c + s·(c − u): it is our scale less one.
    """

    _known: tuple[Tensor | None, list[int]] = (None, [])

    def own_times(self, steps: int) -> list[float] | None:
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
        states, uncond = self.pipe.encode_prompt(
            list(prompts), self.device, guided, negative_prompt=list(negative)
        )
        return Cond(_texts(states), _texts(uncond) if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        time = (1000 - self.clock(level, x)) / 1000
        samples = list(self.scaled(x, level)[:, :, None].unbind())
        texts = zip(cond["states"], self._lengths(cond["mask"]), strict=True)
        states = [states[:length] for states, length in texts]
        outs = self.networks[model](samples, time, states, return_dict=False)[0]
        return -torch.stack(list(outs))[:, :, 0]

    def _lengths(self, mask: Tensor) -> list[int]:
        """How long the texts are; asked once per run, since the host waits for the answer."""
        known, lengths = self._known
        if known is not mask:
            lengths = mask.sum(1).tolist()
            self._known = (mask, lengths)
        return lengths


def _texts(states: list[Tensor]) -> dict[str, Tensor]:
    whole, mask = padded(states)
    return {"states": whole, "mask": mask}
