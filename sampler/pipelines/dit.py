"""DiT: class-conditional transformer over patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.pipelines.base import Adapter
from sampler.pipelines.families import adapter
from sampler.pipelines.texts import class_ids
from sampler.types import Cond, Level


@adapter("DiTPipeline")
class DiT(Adapter):
    """Class-conditional eps-prediction; the channels of the learned variance are dropped.

    A prompt is a class number or one of the pipeline's labels. null_class: the class of the
    unconditional branch, as in the stock pipeline.
    """

    network_name = "transformer"
    processes = ("vp",)
    null_class = 1000
    takes_classes = True

    @property
    def factor(self) -> int:
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own = self.native[0] * self.factor
        if {height, width} - {None, own}:
            raise ValueError(f"This model generates images of {own} x {own} pixels only.")
        return own, own

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        ids = class_ids(prompts, self.network.config.num_embeds_ada_norm, self.pipe.labels)
        if any(negative):
            raise ValueError("A class-conditional model has no negative prompt; leave it out.")
        labels = torch.tensor(ids, device=self.device)
        null = torch.full_like(labels, self.null_class)
        return Cond({"class_labels": labels}, {"class_labels": null} if guided else None)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        time = self.time(level, x).expand(x.shape[0])
        out = self.networks[model](x, timestep=time, return_dict=False, **cond)[0]
        return out[:, : x.shape[1]]
