"""Continuous time of variance-preserving models: the angle a of the level at time t.

alpha = cos a,   sigma = sin a,   a rises with t from about 0 to pi/2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Clock(Protocol):
    """Time of a model. `end`: of the level of pure noise; 0 is that of the least noise."""

    @property
    def end(self) -> float: ...

    def angle(self, t: float) -> float:
        """Angle of the level at time t, in radians."""
        ...

    def time(self, angle: float) -> float:
        """Time of the level of an angle."""
        ...

    def times(self, steps: int) -> list[float]:
        """Times of a run as the stock scheduler spaces them, noisy first, without the last one."""
        ...


@dataclass(frozen=True)
class TrigFlow:
    """Time is the angle itself (Lu and Song, 2024, arXiv:2410.11081, section 3).

    `end` and the second time of two steps are the defaults of diffusers' SCMScheduler.
    """

    end: float = math.pi / 2

    def angle(self, t: float) -> float:
        return min(t, math.pi / 2)  # the stock end is 1.57080, beyond pi/2

    def time(self, angle: float) -> float:
        return angle

    def times(self, steps: int) -> list[float]:
        return [self.end, 1.3] if steps == 2 else _even(self.end, steps)


@dataclass(frozen=True)
class CosineTime:
    """Time in 0..1 of Wuerstchen and Stable Cascade (Pernias et al., 2023, arXiv:2306.00637).

    alpha² = cos²(pi/2·(u + s)/(1 + s)) / cos²(pi/2·s/(1 + s)), within 0.0001..0.9999
    u = 1 − (1 − t)^scaler for a scaler above 1, t^scaler below
    """

    s: float = 0.008
    scaler: float = 1.0
    end: float = 1.0

    @property
    def _first(self) -> float:
        return math.cos(math.pi / 2 * self.s / (1 + self.s))

    def angle(self, t: float) -> float:
        u = 1 - (1 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        alpha = math.cos(math.pi / 2 * (u + self.s) / (1 + self.s)) / self._first
        return math.acos(min(max(alpha * alpha, 0.0001), 0.9999) ** 0.5)

    def time(self, angle: float) -> float:
        alpha = math.cos(angle) * self._first
        u = min(max(math.acos(alpha) * (2 / math.pi) * (1 + self.s) - self.s, 0.0), 1.0)
        return 1 - (1 - u) ** (1 / self.scaler) if self.scaler > 1 else u ** (1 / self.scaler)

    def times(self, steps: int) -> list[float]:
        return _even(1.0, steps)


@dataclass(frozen=True)
class QuarterTurn:
    """Time in 0..1 is the share of a quarter turn: a = pi/2·t (Dance Diffusion, Stable Audio).

    The times of a run have sin a = sin²(pi/2·u) at even u, the betas of IPNDMScheduler.
    """

    end: float = 1.0

    def angle(self, t: float) -> float:
        return math.pi / 2 * t

    def time(self, angle: float) -> float:
        return angle / (math.pi / 2)

    def times(self, steps: int) -> list[float]:
        angles = [self.angle(u) for u in _even(1.0, steps)]
        return [self.time(math.asin(min(1.0, math.sin(a) ** 2))) for a in angles]


def clock_of(scheduler: str, config: Mapping[str, Any]) -> Clock | None:
    """The clock of a stock scheduler in continuous time, None for the others."""
    if scheduler == "SCMScheduler":
        return TrigFlow()
    if scheduler in ("IPNDMScheduler", "CosineDPMSolverMultistepScheduler"):
        return QuarterTurn()
    if scheduler == "DDPMWuerstchenScheduler":
        return CosineTime(config.get("s", 0.008), config.get("scaler", 1.0))
    return None


def _even(end: float, steps: int) -> list[float]:
    return np.linspace(end, 0, steps + 1, dtype=np.float32).tolist()[:-1]
