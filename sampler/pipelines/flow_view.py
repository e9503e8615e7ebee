"""A variance-preserving UNet as a flow-matching model: the same network on other levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sampler.core.schedule import Schedule
from sampler.pipelines.stable_diffusion import StableDiffusion
from sampler.types import Level, Prediction

SMALLEST = 1e-6  # sigma of a finished sample, which must be finite only


class FlowView(StableDiffusion):
    """A Stable Diffusion pipeline on the levels of flow matching, predicting the velocity.

        x = (1 − sigma)·x0 + sigma·eps,   r = sqrt((1 − sigma)² + sigma²)
        x/r is the variance-preserving sample at the time t with sigma_t/alpha_t = sigma/(1 − sigma)
        velocity = (x − x0)/sigma,   x0 the estimate of the network at (x/r, t)

    t lies between training times, interpolated in ln(sigma_t/alpha_t). Exact: every sampler, rule
    and trainer of flow models runs on the trained network, and a LoRA of it is one of the pipeline.
    The stock pipeline itself has other levels.
    """

    levels = "flow"

    def read_schedule(self) -> Schedule:
        self.trained = super().read_schedule()
        return Schedule.flow({"num_train_timesteps": self.trained.train_steps})

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        sigma = torch.as_tensor(level.sigma, dtype=torch.float64).reshape(-1).clamp(min=SMALLEST)
        root = ((1 - sigma) ** 2 + sigma**2).sqrt()
        times = torch.tensor([self._time(float(s)) for s in sigma])
        here = self.trained_level(times, (1 - sigma) / root, sigma / root, x)
        scaled = x / root.to(x).view(shape)
        out = super().forward(scaled, here, cond, model).to(x.dtype)
        x0 = Prediction.of(self.trained.prediction, scaled, out, here).x0.tensor()
        return (x - x0) / sigma.to(x).view(shape)

    def trained_level(self, t: Tensor, alpha: Tensor, sigma: Tensor, like: Tensor) -> Level:
        """Return the level of the network's own process: numbers for one, tensors [B] for more."""
        if len(t) == 1:
            return Level(float(t), float(alpha), float(sigma))
        return Level(t.to(like), alpha.to(like), sigma.to(like))

    def _time(self, sigma: float) -> float:
        last = self.trained.train_steps - 1
        return last if sigma == 1 else min(last, self.trained.time_of(sigma / (1 - sigma)))
