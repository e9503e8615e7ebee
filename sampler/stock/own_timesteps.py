"""Drop-ins for schedulers whose `set_timesteps` differs: LCM, SCM and Wuerstchen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler

# diffusers looks for SchedulerMixin in the module of a scheduler that it loads
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from sampler.core.grids import consistency_timesteps
from sampler.stock.scheduler import SamplerScheduler


class LatentConsistency(SamplerScheduler):
    """Drop-in of LCMScheduler: the timesteps are chosen from those of the distillation."""

    _targets: ClassVar[bool] = True

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the grid of a run; see `SamplerScheduler.set_timesteps`.

        original_inference_steps: number of timesteps of the distillation, by default the
        configuration's. strength: share of them, from the clean end, that an image to image run is
        spread over; of given timesteps the share that is run.

        Raises ValueError for more steps than there are such timesteps, and for a strength below 1
        with a grid of the drop-in's own.
        """
        origin = original_inference_steps or self.schedule.origin
        if self._spacing is not None and (strength < 1 or original_inference_steps is not None):
            raise ValueError(
                "A grid and a strength below 1 or original_inference_steps exclude each other; "
                "make the drop-in scheduler without a grid."
            )
        if timesteps is not None:
            skipped = len(timesteps) - int(len(timesteps) * min(strength, 1))
            num_inference_steps, timesteps = None, timesteps[skipped:]
        elif self._spacing is None and num_inference_steps is not None:
            if not 1 <= num_inference_steps <= int(origin * strength):
                raise ValueError(
                    f"num_inference_steps = {num_inference_steps} must lie in "
                    f"1..{int(origin * strength)}: original_inference_steps = {origin} times "
                    f"strength = {strength:g}."
                )
            count = self.schedule.train_steps
            timesteps = consistency_timesteps(num_inference_steps, count, origin, strength)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        self._scaled = True  # the pipelines of these models do not scale the network's input


class ClosedScheduler(SamplerScheduler):
    """`timesteps` has one entry more than the run has steps, which its pipelines leave out."""

    _rounding: ClassVar[float] = 2.0**-8  # times in 0..pi/2 in the data type of the network
    _targets: ClassVar[bool] = True

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
    ) -> None:
        """Set the grid of a run; see `SamplerScheduler.set_timesteps`.

        timesteps: with the last one, 0. max_timesteps: of SCM, the first time of evenly spaced ones
        (default pi/2); intermediate_timesteps: the second one of two. A grid of the drop-in's own
        goes before both.

        Raises ValueError for timesteps that do not end at 0, and for a second time of another
        number of steps.
        """
        if timesteps is not None:
            times = [float(t) for t in timesteps]
            if len(times) < 2 or times[-1] != 0:
                raise ValueError(f"timesteps = {times} must have one more entry, 0, at their end.")
            num_inference_steps, timesteps = len(times) - 1, times[:-1]
        elif self._spacing is None and num_inference_steps and max_timesteps is not None:
            if intermediate_timesteps is not None and num_inference_steps != 2:
                raise ValueError(
                    f"intermediate_timesteps = {intermediate_timesteps} is the second time of two "
                    f"steps; set it to None for {num_inference_steps}."
                )
            timesteps = np.linspace(max_timesteps, 0, num_inference_steps + 1).tolist()[:-1]
            if intermediate_timesteps is not None:
                timesteps = [max_timesteps, intermediate_timesteps]
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        last = self._spans[-1].next.t
        self.timesteps = torch.cat([self.timesteps.float(), self.timesteps.new_tensor([last])])
        self._scaled = True  # as in LatentConsistency


class CascadeScheduler(ClosedScheduler, DDPMWuerstchenScheduler):
    """Drop-in of a class that the pipelines of Stable Cascade look for."""

    _targets: ClassVar[bool] = False
