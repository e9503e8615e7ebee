"""Consistency models: pixels in one evaluation, or a few."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sampler_kernels import Lin
from torch import Tensor

from sampler.core import grids
from sampler.pipelines.base import adapter, class_ids
from sampler.pipelines.unconditional import PixelUNet
from sampler.types import Cond, Level, Prediction


@dataclass(frozen=True)
class ConsistencySchedule:
    """Karras' ramp s of a consistency model, seen from its cleanest level s_min as alpha = 1.

        x = x0 + sigma·eps,   sigma² = s² − s_min²,   t = 250·ln(s)

    So x0 is an image at s_min, where these models end, and noising one again adds sigma.
    Song et al. (2023), arXiv:2303.01469, Algorithm 1; settings are diffusers' scheduler's.
    """

    train_steps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    process: str = "consistency"
    prediction: str = "x0"
    dynamic: None = None

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ConsistencySchedule:
        """Raises ValueError for the configuration of another scheduler."""
        names = ("sigma_min", "sigma_max", "sigma_data", "rho")
        if any(config.get(name) is None for name in names):
            raise ValueError(
                "A ConsistencyModelPipeline needs the levels of a CMStochasticIterativeScheduler."
            )
        options = {name: config[name] for name in names}
        return ConsistencySchedule(train_steps=config["num_train_timesteps"], **options)

    def grid(self, steps: int) -> tuple[Level, ...]:
        """Raises ValueError for steps outside 1 .. the levels of training."""
        n = self.train_steps
        if not 1 <= steps <= n:
            raise ValueError(f"steps = {steps} must lie in 1..{n}.")
        # the ramp is walked backwards: position k of the table, from its low end
        table = grids.karras(self.sigma_min, self.sigma_max, n, self.rho)
        chosen = [table[k * (n // steps)] for k in range(steps)]
        return (*(self._level(s) for s in chosen), Level(0, 1.0, 0.0))

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        return self.sigma_max

    def network_input(self, level: Level) -> float:
        return 1 / math.hypot(self._s(level), self.sigma_data)

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        """x0 = c_skip·x + c_out·out, which is x itself at s_min."""
        s, d = self._s(level), self.sigma_data
        beyond = s - self.sigma_min
        skip = d * d / (beyond * beyond + d * d)
        return Prediction.from_x0(
            x, skip * Lin.of(x) + beyond * d / math.hypot(s, d) * Lin.of(out), level
        )

    def _s(self, level: Level) -> float:
        return math.hypot(level.sigma, self.sigma_min)

    def _level(self, s: float) -> Level:
        s = float(torch.tensor(s))  # float32, as the stock scheduler keeps them
        return Level(250 * math.log(s + 1e-44), 1.0, math.sqrt(max(s * s - self.sigma_min**2, 0.0)))


@adapter("ConsistencyModelPipeline")
class ConsistencyModel(PixelUNet):
    """x0 in one jump, for a class where the network has classes: a prompt is a class's number."""

    processes = ("consistency",)
    classified = True

    @property
    def default_sampler(self) -> str:
        return "consistency"

    def read_schedule(self) -> Any:
        return ConsistencySchedule.from_config(self.pipe.scheduler.config)

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
