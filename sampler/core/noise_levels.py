"""Levels of a forward process, x_t = alpha·x0 + sigma·eps, at any timestep or noise.

    vp     alpha = sqrt(acp_t), sigma = sqrt(1 − acp_t), t an index of the training table, or
           alpha = cos a, sigma = sin a of the angle a(t) of a clock in continuous time
    edm    alpha = 1, sigma on Karras' ramp or an exponential one, network input t = ln(sigma)/4,
           or sigma = tan a of a clock
    flow   alpha = 1 − sigma, network input t = N·sigma

The vp table is float32, as in training and in the stock schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sampler_kernels import Lin
from torch import Tensor

from sampler.core import grids
from sampler.core.clocks import Clock
from sampler.types import Level, Prediction

Spacing = Literal["leading", "trailing", "linspace", "karras"]
Final = Literal["zero", "sigma_min"]


@dataclass(frozen=True)
class NoiseLevels:
    """Settings of a model's noise levels, and a level at any timestep; `Schedule` has its grids.

    process: forward process. prediction: network output, "eps", "v", "x0" or "velocity".
    train_steps: N, the number of training timesteps; table: acp_t [N] for vp.
    spacing, karras, final: the defaults of `grid`. offset: added to the timesteps of "leading".
    open_end: spread one point more and drop the last. from_zero, to_zero: spread flow times over
    0..1 − 1/N, or over 0..1 without its end, instead of 1/N..1. sigma_units: work in
    sigma/alpha, with fractional timesteps, as Euler schedulers do. round_karras: round timesteps
    on Karras' ramp to integers.
    sigma_min, sigma_max, rho: ends of Karras' ramp (None: those of the table) and its exponent.
    sigma_data: standard deviation of the data, for the preconditioning in `predict`.
    shift, terminal: of flow times, see `grids.FlowSpread`; dynamic: configuration of a shift that
    follows the image size, None for a static one.
    origin: number of timesteps that a latent consistency model was distilled on, 0 for other
    models. timestep_scaling: s = timestep_scaling·t in its boundary factors, see `predict`.
    ramp: "exponential" or "beta_sigmas" as the default of `grid`, "karras" on flow models.
    clock: continuous time of a vp model, None with a table, or of an edm one, None for
    ln(sigma)/4. closed: whether the timesteps of a stock run include the last level's. noise_std:
    standard deviation of eps in a stock pipeline's latents.
    """

    process: Literal["vp", "edm", "flow", "consistency"]
    prediction: str
    table: tuple[float, ...] = ()
    train_steps: int = 1000
    spacing: Spacing = "leading"
    karras: bool = False
    final: Final = "zero"
    offset: int = 0
    open_end: bool = False
    from_zero: bool = False
    to_zero: bool = False
    sigma_units: bool = False
    round_karras: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    rho: float = 7.0
    shift: float = 1.0
    terminal: float | None = None
    dynamic: Mapping[str, Any] | None = None
    origin: int = 0
    timestep_scaling: float = 10.0
    ramp: str | None = None
    clock: Clock | None = None
    closed: bool = False
    noise_std: float = 1.0

    def level(self, t: float) -> Level:
        """Return the level of timestep t; between integers sigma/alpha is interpolated linearly.

        Raises ValueError for a timestep outside the training table.
        """
        if self.process == "edm":
            noise = math.exp(4 * t) if self.clock is None else math.tan(self.clock.angle(t))
            return Level(t, 1.0, noise)
        if self.process == "flow":
            return Level(t, 1 - t / self.train_steps, t / self.train_steps)
        if self.clock is not None:
            if not 0 <= t <= self.clock.end + 1e-4:
                raise ValueError(f"Timestep {t} must lie in 0..{self.clock.end:g}.")
            angle = self.clock.angle(t)
            return from_ratio(float(t), math.inf if angle >= math.pi / 2 else math.tan(angle))
        low = math.floor(t)
        if not 0 <= low <= self.train_steps - 1:
            raise ValueError(f"Timestep {t} must lie in 0..{self.train_steps - 1}.")
        if low == t:
            alphas, sigmas = self._roots
            return Level(t, alphas[low], sigmas[low])
        return from_ratio(t, float(np.interp(t, (low, low + 1), self._ratios()[low : low + 2])))

    def level_of(self, t: float, sigma: float) -> Level:
        """Return the level of sigma of a flow, else of sigma/alpha."""
        if self.process == "flow":
            return Level(t, 1 - sigma, sigma)
        return from_ratio(t, sigma)

    def stock_sigma(self, level: Level) -> float:
        """Entry of a level in a stock scheduler's `sigmas`: sigma of a flow, else sigma/alpha."""
        return level.sigma / (1.0 if self.process == "flow" else level.alpha or math.nan)

    def of_stock(self, t: float, sigma: float) -> Level:
        """Return the level of timestep t whose entry in a stock scheduler's `sigmas` is sigma."""
        return Level(t, 1.0, sigma) if self.process == "edm" else self.level_of(t, sigma)

    def time_of(self, ratio: float) -> float:
        """Return t of the level with sigma/alpha = ratio, interpolated in ln(ratio) for vp."""
        if self.clock is not None:
            return self.clock.time(math.atan(ratio))
        if self.process == "edm":
            return 0.25 * math.log(ratio)
        if self.process == "flow":
            return self.train_steps * ratio / (1 + ratio)
        known = self._ratios()
        known = known[np.isfinite(known)]
        return float(np.interp(math.log(ratio), np.log(known), np.arange(len(known))))

    def initial_scale(self, grid: tuple[Level, ...]) -> float:
        """Factor on the first noise: the stock scheduler's `init_noise_sigma`."""
        if self.process == "edm":
            return math.sqrt(grid[0].sigma ** 2 + 1)
        if self.sigma_units and self.spacing in ("linspace", "trailing"):
            return grid[0].sigma
        return 1.0

    def predict(self, x: Tensor, out: Tensor, level: Level) -> Prediction:
        """Interpret the network output [B, ...] at x [B, ...] as a Prediction.

        For "edm": x0 = c_skip·x + c_out·out (Karras et al., 2022, arXiv:2206.00364, table 1). For a
        latent consistency model: f = c_skip·x + c_out·x0, c_skip = d²/(s² + d²), c_out =
        s/sqrt(s² + d²), s = timestep_scaling·t, d = sigma_data (arXiv:2310.04378, section 4.1).
        """
        if self.process != "edm" and not self.origin:
            return Prediction.of(self.prediction, x, out, level)
        s, d = level.sigma, self.sigma_data
        if self.origin:
            s = self.timestep_scaling * level.t
            norm, x0 = s * s + d * d, Prediction.of(self.prediction, x, out, level).x0
            return Prediction.from_x0(x, x0 * (s / norm**0.5) + Lin.of(x) * (d * d / norm), level)
        total = s * s + d * d
        c_out = s * d / total**0.5 * (1 if self.prediction == "eps" else -1)
        return Prediction.from_x0(x, Lin.of(x) * (d * d / total) + Lin.of(out) * c_out, level)

    def output_of(self, x: Tensor, pred: Prediction, level: Level) -> Lin:
        """Network output of a Prediction at x [B, ...]; the inverse of `predict` for "edm"."""
        s, d = level.sigma, self.sigma_data
        total = s * s + d * d
        c_out = s * d / total**0.5 * (1 if self.prediction == "eps" else -1)
        return (pred.x0 - Lin.of(x) * (d * d / total)) / c_out

    @property
    def preconditioned(self) -> bool:
        """Return whether x0 is a combination of x and the network's output, see `predict`."""
        return self.process in ("edm", "consistency")

    @property
    def rising(self) -> bool:
        """Return whether timesteps rise from noise to image, and the output is −velocity."""
        return False

    @property
    def scales_input(self) -> bool:
        """Return whether pipelines call `scale_model_input` of the stock scheduler."""
        return self.process != "flow"

    def network_input(self, level: Level) -> float:
        """Factor on x before it enters the network; 1 except for "edm"."""
        if self.process != "edm":
            return 1.0
        return 1 / math.sqrt(level.sigma**2 + self.sigma_data**2)

    @cached_property
    def _roots(self) -> tuple[list[float], list[float]]:
        """alpha and sigma of every training timestep.

        By torch's float32 square root, as in the stock schedulers; numpy's differs by one bit.
        """
        acp = torch.tensor(self.table, dtype=torch.float32)
        return grids.floats(acp**0.5), grids.floats((1 - acp) ** 0.5)

    def _ratios(self) -> npt.NDArray[np.float64]:
        """sigma/alpha of every training timestep [N], float64; infinite at alpha = 0."""
        if self.clock is not None:
            times = np.arange(1, self.train_steps + 1) * (self.clock.end / self.train_steps)
            levels = [self.level(t) for t in times.tolist()]
            return np.array([v.sigma / v.alpha if v.alpha else math.inf for v in levels])
        acp: Any = np.asarray(self.table, dtype=np.float32)
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt((np.float32(1) - acp) / acp), dtype=np.float64)


def from_ratio(t: float, ratio: float) -> Level:
    """Return the vp level with sigma/alpha = ratio."""
    if math.isinf(ratio):
        return Level(t, 0.0, 1.0)
    alpha = 1 / math.sqrt(1 + ratio * ratio)
    return Level(t, alpha, ratio * alpha)
