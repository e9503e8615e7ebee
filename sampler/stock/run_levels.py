"""Noise levels of the steps of a stock pipeline's run, read from its scheduler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import ModelError
from sampler.core.stock_schedule import schedule_of
from sampler.pipelines.call_arguments import scheduler_of
from sampler.pipelines.families import processes
from sampler.types import Level, Span


class RunLevels:
    """Levels of a run by position, since rounded timesteps may repeat.

    schedule: of the pipeline's scheduler. position: of the first step, later than 0 for image to
    image.

    Raises ModelError for a scheduler whose levels the pipeline is not trained with.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.position = pipe, 0
        self._last: tuple[Any, Any] = (None, None)
        self.read_schedule()

    def read_schedule(self) -> None:
        """Read the scheduler, which may have been replaced; a run begins."""
        scheduler = scheduler_of(self.pipe)
        self._read: tuple[Any, list[float], list[float]] | None = None
        read = (scheduler, getattr(scheduler, "_internal_dict", None))  # a new one where it changes
        if all(a is b for a, b in zip(read, self._last, strict=True)):
            return
        self._last = read
        self.schedule = schedule_of(scheduler.config, type(scheduler).__name__)
        # whether it holds x/alpha of a vp process; most drop-ins hold x
        units = self.schedule.process == "vp" and self.schedule.sigma_units
        self._over_alpha = units and getattr(type(scheduler), "over_alpha", True)
        trained = processes(type(self.pipe).__name__.replace("Img2Img", ""))
        if self.schedule.process not in trained:  # a velocity read as noise gives no error
            raise ModelError(
                f"{type(self.pipe).__name__} is trained with {' or '.join(trained)} levels, and "
                f"its scheduler, {type(scheduler).__name__}, has {self.schedule.process} ones."
            )

    def expected(self) -> Span:
        """Span of the first step of a run, before any call of it."""
        self.position = int(getattr(scheduler_of(self.pipe), "begin_index", None) or 0)
        now, after = self._level(self.position), self._level(self.position + 1)
        return Span(0, now, after, self._steps - self.position)

    def span(self, index: int, timestep: Any) -> Span:
        """Span of step `index`, whose first one is at the position of its timestep."""
        times, _ = self._numbers()
        if index == 0:
            self.position = position_of(scheduler_of(self.pipe).timesteps, number(timestep))
        position = min(self.position + index, len(times) - 1)
        now, after = self._level(position), self._level(position + 1)
        return Span(index, now, after, self._steps - self.position)

    def time(self, index: int) -> float:
        """Timestep of step `index`."""
        times, _ = self._numbers()
        return times[min(self.position + index, len(times) - 1)]

    @property
    def exploding(self) -> bool:
        """Return whether the scheduler holds x0 + sigma·eps with a sigma that may be above 1."""
        return self.schedule.process == "edm" or self._over_alpha

    @property
    def kind(self) -> str:
        """Parametrisation that the scheduler is given, "" for one that `Schedule.predict` reads."""
        own = self.schedule.preconditioned or self.schedule.rising
        return "" if own else self.schedule.prediction

    def sigma(self, level: Level) -> float:
        """sigma of the scheduler's x = x0 + sigma·eps, of a flow or of a v-prediction, else 0."""
        if self.schedule.process == "flow" or (self.kind == "v" and not self.exploding):
            return level.sigma
        return level.sigma / level.alpha if self.exploding and level.alpha else 0.0

    def seen(self, x: Tensor, level: Level) -> Tensor:
        """x = alpha·x0 + sigma·eps of what the scheduler holds."""
        return x * level.alpha if self._over_alpha else x

    @property
    def _steps(self) -> int:
        return len(scheduler_of(self.pipe).timesteps) - self.schedule.closed

    def _numbers(self) -> tuple[list[float], list[float]]:
        """Timesteps and sigmas of the run, copied to the host once; no sigmas where it has none."""
        scheduler = scheduler_of(self.pipe)
        if self._read is None or self._read[0] is not scheduler.timesteps:
            times, sigmas = scheduler.timesteps.tolist(), getattr(scheduler, "sigmas", ())
            known = len(sigmas) == len(times) + 1
            self._read = (
                scheduler.timesteps,
                times,
                torch.as_tensor(sigmas).tolist() if known else [],
            )
        return self._read[1], self._read[2]

    def _level(self, position: int) -> Level:
        times, sigmas = self._numbers()
        t = float(times[position]) if position < len(times) else 0
        sigma = sigmas[position] if sigmas else math.nan
        if not math.isnan(sigma):
            return self.schedule.of_stock(t, sigma)
        return self.schedule.level(t) if position < len(times) else Level(0, 1.0, 0.0)


def position_of(times: Tensor, timestep: float) -> int:
    """Position of a timestep; half-precision networks receive a rounded one."""
    return int((times.double().cpu() - timestep).abs().argmin())


def number(timestep: Any) -> float:
    """Timestep of a batch as a number."""
    if isinstance(timestep, Tensor) and timestep.numel() == 1:
        return float(timestep)
    return float(torch.as_tensor(timestep).flatten()[0])
