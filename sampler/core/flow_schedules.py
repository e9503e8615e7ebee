"""Levels of flow-matching schedulers with other times or other noise than 1 − alpha.

NoisyFlow       x = x0 + sigma·eps,            t = N·sigma         Cosmos-Predict2
BackwardFlow    x = (1 − sigma)·x0 + sigma·eps, t = N·(1 − sigma)  Mochi, LongCat-AudioDiT
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from sampler_kernels import Lin
from torch import Tensor

from sampler.core.noise_levels import Final
from sampler.core.schedule import Schedule
from sampler.types import Level, Prediction


@dataclass(frozen=True)
class NoisyFlow(Schedule):
    """Ramp from sigma_max, above 1, to sigma_min of a scheduler's configuration.

    The scheduler is given (x − x0)/sigma, which is eps; x0, the scale of the network's input and
    that of the first noise are the pipeline's own.
    """

    process: Literal["vp", "edm", "flow", "consistency"] = "edm"
    prediction: str = "eps"

    def level(self, t: float) -> Level:
        return Level(t, 1.0, t / self.train_steps)

    def time_of(self, ratio: float) -> float:
        return self.train_steps * ratio

    def grid(
        self,
        steps: int,
        spacing: Any = None,
        final: Final | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Level, ...]:
        """The ends of the ramp are the configuration's: mu and the values of sigmas change nothing.

        Raises ValueError for another number of sigmas.
        """
        if sigmas is not None and len(sigmas) != steps:
            raise ValueError(f"{len(sigmas)} sigmas are {len(sigmas)} steps, not {steps}.")
        return super().grid(steps, spacing, final)

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        return 1.0

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        return Prediction.of(self.prediction, x, out, level)

    def network_input(self, level: Level) -> float:
        return 1.0

    @property
    def preconditioned(self) -> bool:
        return False

    @property
    def scales_input(self) -> bool:
        return False


@dataclass(frozen=True)
class BackwardFlow(Schedule):
    """Flow whose network is told N·(1 − sigma), rising from 0, and answers with −velocity."""

    process: Literal["vp", "edm", "flow", "consistency"] = "flow"
    prediction: str = "velocity"

    def level(self, t: float) -> Level:
        return Level(t, t / self.train_steps, 1 - t / self.train_steps)

    def time_of(self, ratio: float) -> float:
        return self.train_steps / (1 + ratio)

    def stock_sigma(self, level: Level) -> float:
        return 1 - level.sigma

    def of_stock(self, t: float, sigma: float) -> Level:
        return Level(t, sigma, 1 - sigma)

    def grid(
        self,
        steps: int,
        spacing: Any = None,
        final: Final | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Level, ...]:
        """Raises ValueError for a list of timesteps, which would have to rise."""
        levels = super().grid(steps, spacing, final, mu, sigmas)
        if any(after.sigma >= now.sigma for now, after in pairwise(levels[:-1])):
            raise ValueError(
                "grid: the timesteps of this model rise to the image, so a list of them is not "
                "supported; give 'sigmas'."
            )
        return tuple(v._replace(t=self.train_steps * (1 - v.sigma)) for v in levels)

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        return Prediction.of(self.prediction, Lin.of(x), -Lin.of(out), level)

    def output_of(self, x: Tensor, pred: Prediction, level: Level) -> Lin:
        return -pred.velocity

    @property
    def rising(self) -> bool:
        return True


def flow_schedule(config: Mapping[str, Any], name: str) -> Schedule | None:
    """One of the schedules of this module, None for other schedulers.

    Raises ValueError for settings that these levels do not go with.
    """
    high = config.get("sigma_max") or 0.0
    if "FlowMatchEuler" not in name or not (high > 1 or config.get("invert_sigmas")):
        return None
    plain = Schedule.from_config({**config, "invert_sigmas": False}, name)
    if not config.get("invert_sigmas"):
        return None if plain.ramp is None else _noisy(config, plain)
    if high > 1:
        raise ValueError(
            f"{name}: invert_sigmas = True with sigma_max = {high:g} is not supported; use a "
            "scheduler configuration without one of them."
        )
    return BackwardFlow(**{field.name: getattr(plain, field.name) for field in fields(plain)})


def _noisy(config: Mapping[str, Any], plain: Schedule) -> NoisyFlow:
    low, high = config.get("sigma_min"), config["sigma_max"]
    if not low or not 0 < low < high:
        raise ValueError(
            f"sigma_min = {low} of levels up to sigma_max = {high:g} must lie between; give it in "
            "the scheduler's configuration."
        )
    ramp = None if plain.ramp == "karras" else plain.ramp
    return NoisyFlow(
        train_steps=plain.train_steps,
        final=config.get("final_sigmas_type", "zero"),
        sigma_min=low,
        sigma_max=high,
        ramp=ramp,
    )
