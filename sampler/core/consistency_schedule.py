"""Noise levels of consistency models, as diffusers' CMStochasticIterativeScheduler has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sampler_kernels import Lin
from torch import Tensor

from sampler.core import ramps
from sampler.core.schedule import Final, Schedule, Spacing
from sampler.registry.constraints import as_int
from sampler.types import Level, Prediction


@dataclass(frozen=True)
class ConsistencySchedule(Schedule):
    """Karras' ramp s of a consistency model, seen from its cleanest level s_min as alpha = 1.

        x = x0 + sigma·eps,   sigma² = s² − s_min²,   t = 250·ln(s)

    So x0 is an image at s_min, where these models end, and noising one again adds sigma.
    Song et al. (2023), arXiv:2303.01469, Algorithm 1.
    """

    process: Literal["vp", "edm", "flow", "consistency"] = "consistency"
    prediction: str = "x0"
    train_steps: int = 40
    low: float = 0.002
    high: float = 80.0

    @staticmethod
    def consistency(config: Mapping[str, Any]) -> ConsistencySchedule:
        """Read the settings of the scheduler; ValueError for another scheduler's configuration."""
        names = ("sigma_min", "sigma_max", "sigma_data", "rho")
        if any(config.get(name) is None for name in names):
            raise ValueError(
                "A ConsistencyModelPipeline needs the levels of a CMStochasticIterativeScheduler."
            )
        low, high, sigma_data, rho = (config[name] for name in names)
        return ConsistencySchedule(
            train_steps=config["num_train_timesteps"],
            low=low,
            high=high,
            sigma_data=sigma_data,
            rho=rho,
        )

    def level(self, t: float) -> Level:
        return self._level(math.exp(t / 250))

    def grid(
        self,
        steps: int,
        spacing: Spacing | None = None,
        final: Final | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Level, ...]:
        """Raises ValueError for steps outside 1 .. the levels of training, and for other grids."""
        steps, n = as_int(steps, "steps"), self.train_steps
        if not 1 <= steps <= n:
            raise ValueError(f"steps = {steps} must lie in 1..{n}.")
        if not spacing is final is mu is sigmas is None:
            raise ValueError("A consistency model has one grid; give its number of steps only.")
        # the ramp is walked backwards: position k of the table, from its low end
        table = ramps.karras(self.low, self.high, n, {"rho": self.rho})
        chosen = [table[k * (n // steps)] for k in range(steps)]
        return (*(self._level(s) for s in chosen), Level(0, 1.0, 0.0))

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        return self.high

    def network_input(self, level: Level) -> float:
        return 1 / math.hypot(self._s(level), self.sigma_data)

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        """x0 = c_skip·x + c_out·out, which is x itself at s_min."""
        s, d = self._s(level), self.sigma_data
        beyond = s - self.low
        skip = d * d / (beyond * beyond + d * d)
        return Prediction.from_x0(
            x, skip * Lin.of(x) + beyond * d / math.hypot(s, d) * Lin.of(out), level
        )

    def output_of(self, x: Tensor, pred: Prediction, level: Level) -> Lin:
        s, d = self._s(level), self.sigma_data
        beyond = s - self.low
        skip = d * d / (beyond * beyond + d * d)
        return (pred.x0 - skip * Lin.of(x)) * (math.hypot(s, d) / (beyond * d))

    def _s(self, level: Level) -> float:
        return math.hypot(level.sigma, self.low)

    def _level(self, s: float) -> Level:
        s = float(torch.tensor(s))  # float32, as the stock scheduler keeps them
        return Level(250 * math.log(s + 1e-44), 1.0, math.sqrt(max(s * s - self.low**2, 0.0)))
