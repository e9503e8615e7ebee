"""Consistency models of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler.core.consistency_schedule import ConsistencySchedule
from sampler.pipelines.families import adapter
from sampler.pipelines.texts import class_ids
from sampler.pipelines.unconditional import PixelUNet
from sampler.types import Cond, Level, Prediction


@adapter("ConsistencyModelPipeline")
class ConsistencyModel(PixelUNet):
    """x0-prediction; where the network has classes, a prompt is a class number."""

    processes = ("consistency",)
    takes_classes = True

    @property
    def default_sampler(self) -> str:
        return "consistency"

    def read_schedule(self) -> ConsistencySchedule:
        return ConsistencySchedule.consistency(self.pipe.scheduler.config)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        classes = self.network.config.num_class_embeds
        self.no_text(prompts if classes is None else (), negative, guided)
        if classes is None:
            return Cond({})
        ids = class_ids(prompts, classes, {})
        return Cond({"class_labels": torch.tensor(ids, dtype=torch.int, device=self.device)})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        x = self.scaled(x, level)
        return self.networks[model](x, self.time(level, x), return_dict=False, **cond)[0]

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        pred = super().predict(x, out, level, model)
        if not self.pipe.scheduler.config.get("clip_denoised"):
            return pred
        return Prediction.from_x0(x, pred.x0.tensor().clamp(-1, 1), level)
