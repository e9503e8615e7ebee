"""Drop-in for pipelines that compute with x/alpha and the sigmas of an Euler scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

# diffusers looks for SchedulerMixin in the module of a scheduler that it loads
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from sampler.core.schedule import Schedule
from sampler.stock.scheduler import SamplerScheduler
from sampler.types import Level


def computes_over_alpha(schedule: Schedule) -> bool:
    """Return whether pipelines of a scheduler may compute x0 from x/alpha themselves.

    So they do where an Euler scheduler is told that its input is x0 (the latent upscaler).
    """
    return schedule.process == "vp" and schedule.sigma_units and schedule.prediction == "x0"


class OverAlpha(SamplerScheduler):
    """The pipeline holds x/alpha = x0 + sigma/alpha·eps, as with the replaced scheduler."""

    over_alpha: ClassVar[bool] = True

    @property
    def init_noise_sigma(self) -> float:
        return super().init_noise_sigma / (self._grid or self._trial)[0].alpha

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale x/alpha for the network, or a level sigma/alpha in its place."""
        self._scaled = True
        return sample * self._level(timestep).alpha

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        x = super().add_noise(original_samples, noise, timesteps)
        shape = (-1, *(1,) * (x.ndim - 1))
        alphas = [self._level(t).alpha for t in timesteps.reshape(-1)]
        return x / x.new_tensor(alphas).view(shape)

    def _x_of(self, sample: Tensor, level: Level) -> Tensor:
        return sample * level.alpha

    def _held(self, x: Tensor, level: Level) -> Tensor:
        return x / level.alpha
