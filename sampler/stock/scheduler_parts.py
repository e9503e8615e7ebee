"""Parts of a drop-in scheduler that pipelines read beside its steps: tables, levels, noised x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from sampler.core.schedule import Schedule
from sampler.stock.step_arguments import absent, is_integer_part
from sampler.types import Level, Span


class SchedulerParts(SchedulerMixin, ConfigMixin):
    """Attributes and noising of a drop-in scheduler under the names of diffusers.

    A subclass sets schedule, timesteps, the grid and the spans of a run, and its position.
    """

    schedule: Schedule
    timesteps: Tensor
    _grid: tuple[Level, ...]
    _trial: tuple[Level, ...]
    _spans: Sequence[Span]
    _index: int | None
    _begin: int | None
    _noised: bool
    _sigmas: Tensor | None
    _x: Tensor | None
    _joined: tuple[Any, FrozenDict] | None = None  # the saved entries, and `config` of these
    _times: tuple[Any, list[float]] | None = None  # `timesteps`, and its numbers

    @property
    def config(self) -> Any:
        """The saved entries and those of the replaced scheduler, which pipelines read."""
        own = self._internal_dict
        if self._joined is None or self._joined[0] is not own:
            self._joined = own, FrozenDict({**own["base"], **own})
        return self._joined[1]

    @property
    def init_noise_sigma(self) -> float:
        """Factor on the first noise, also for pipelines that draw it before they set timesteps."""
        return self.schedule.initial_scale(self._grid or self._trial)

    @property
    def sigmas(self) -> Tensor:
        """Noise of every step's level and of the last one, as the replaced scheduler has it.

        One tensor for a run, so that changes of it by a pipeline are seen.
        """
        if self._sigmas is None:
            self._sigmas = self._noise()
        return self._sigmas

    def _noise(self) -> Tensor:
        grid = [*(span.now for span in self._spans), *(span.next for span in self._spans[-1:])]
        return torch.tensor([self.schedule.stock_sigma(level) for level in grid])

    def _check_noise(self) -> None:
        """Raise ValueError for levels that a pipeline has changed to others."""
        if self._sigmas is not None:
            own, seen = self._noise().nan_to_num(), self._sigmas.cpu().nan_to_num()
            if not torch.equal(own, seen):
                raise ValueError(
                    "This pipeline changes the sigmas of its scheduler, which a drop-in does not "
                    "follow; keep the scheduler that the pipeline came with."
                )

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha² of every timestep of training [N], of a vp process."""
        return torch.tensor(self._of_betas("alphas_cumprod"))

    @property
    def alphas(self) -> Tensor:
        """Factors of alphas_cumprod [N]: 1 − beta."""
        table = torch.tensor(self._of_betas("alphas"), dtype=torch.float64)
        return torch.cat([table[:1], table[1:] / table[:-1]]).float()

    @property
    def betas(self) -> Tensor:
        """Variance that each timestep of training adds [N], of a vp process."""
        return 1.0 - self.alphas

    def _of_betas(self, name: str) -> tuple[float, ...]:
        if self.schedule.process != "vp":
            raise absent(name)
        return self.schedule.table

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise absent(name) from None

    @property
    def step_index(self) -> int | None:
        return self._index

    @property
    def begin_index(self) -> int | None:
        return self._begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the first step; image-to-image pipelines skip the noisiest ones."""
        self._begin = begin_index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha·x0 + sigma·noise, each sample at its timestep.

        Raises ValueError without a timestep: image to image at a strength below 1/steps.
        """
        if not timesteps.numel():
            raise ValueError(
                f"The strength leaves none of {len(self._grid) - 1} steps; raise strength or steps."
            )
        self._noised = True
        levels = [self._level(t) for t in timesteps.reshape(-1)]
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.tensor([getattr(level, k) for level in levels]).view(shape).to(original_samples)
            for k in ("alpha", "sigma")
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.schedule.train_steps

    @property
    def _t(self) -> list[float]:
        if self._times is None or self._times[0] is not self.timesteps:
            self._times = self.timesteps, self.timesteps.tolist()
        return self._times[1]

    def _first(self, timestep: Any) -> int:
        if self._begin is not None:
            return self._begin
        times = self._t
        if float(timestep) in times:
            return times.index(float(timestep))
        return next((k for k, t in enumerate(times) if is_integer_part(timestep, t)), len(times))

    def _level(self, timestep: Any) -> Level:
        """Level of a timestep: at the position of the run, else the first one on its grid."""
        t, times = float(timestep), self._t[: len(self._spans)]
        for index in (self._index, self._begin):
            if index is not None and index < len(times) and times[index] == t:
                return self._spans[index].now
        if t in times:
            return self._spans[times.index(t)].now
        return self.schedule.level(int(t) if t.is_integer() else t)

    def _precise(self, sample: Tensor, level: Level) -> Tensor:
        """x in full precision: the last step's, unless the pipeline changed the sample since."""
        if sample.dtype in (torch.float32, torch.float64):
            return self._x_of(sample, level)
        if self._x is not None and torch.equal(self._held(self._x, level).to(sample.dtype), sample):
            return self._x
        return self._x_of(sample.float(), level)

    def _x_of(self, sample: Tensor, level: Level) -> Tensor:
        """x = alpha·x0 + sigma·eps of the sample that the pipeline holds."""
        return sample

    def _held(self, x: Tensor, level: Level) -> Tensor:
        """The sample that the pipeline holds for x; the inverse of `_x_of`."""
        return x
