"""Error of every sampler against the exact ODE, on a guided Gaussian mixture.

The conditional and the unconditional mixture are those of tests/golden/samplers/momentum_cfg.npz;
the probability-flow ODE of eps_u + w·(eps_c − eps_u) is solved with DOP853 from the very level at
which a sampler starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import sampler
from sampler.types import Level

DATA = Path(__file__).parents[2] / "tests" / "golden" / "samplers" / "momentum_cfg.npz"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (8, 10, 12, 15, 20, 30)
SCALES = (1.0, 3.0, 5.0, 7.5, 10.0, 15.0)
ROWS = 32


def momentum(name: str, number: float | str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "momentum_number": number, **fields}


SAMPLERS: dict[str, Any] = {
    "ddim": "ddim",
    "heun (half the steps)": "heun",
    "ab 2": {"name": "ab", "order": 2},
    "ab 3": {"name": "ab", "order": 3},
    "ab 4": {"name": "ab", "order": 4},
    "ab 3 variable": {"name": "ab", "order": 3, "steps": "variable"},
    "heavy_ball 0.8": momentum("heavy_ball", 0.8),
    "heavy_ball 1.8": momentum("heavy_ball", 1.8),
    "heavy_ball 3.8": momentum("heavy_ball", 3.8),
    "heavy_ball dpmpp_2m 0.8": {"name": "heavy_ball", "base": "dpmpp_2m", "beta": 0.8},
    "heavy_ball unipc 0.8": {"name": "heavy_ball", "base": "unipc", "beta": 0.8},
    "nesterov 1.8": momentum("nesterov", 1.8),
    **{f"ghvb {m:g}": momentum("ghvb", m) for m in (0.8, 1.2, 1.5, 1.8, 1.9, 2.5, 2.8, 3.5, 3.8)},
    "dpmpp_2m": "dpmpp_2m",
    "unipc": "unipc",
}
# Stock schedulers that have no equal here; those that have are tested equal in tests/samplers.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "diffusers DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "diffusers UniPC 2": ("UniPCMultistepScheduler", {}),
    "diffusers DEIS 2": ("DEISMultistepScheduler", {}),
}


class Mixture(NamedTuple):
    """w [K], mu [K, D], sd [K] of a Gaussian mixture, float64."""

    w: Tensor
    mu: Tensor
    sd: Tensor

    def eps(self, x: Tensor, level: Level) -> Tensor:
        """The exact noise prediction at x [B, D]."""
        a, s = level.alpha, level.sigma
        var = (a * self.sd) ** 2 + s * s
        gap = x[:, None] - a * self.mu
        log = self.w.log() - x.shape[1] / 2 * var.log() - gap.square().sum(-1) / (2 * var)
        return s * ((log.softmax(1) / var)[..., None] * gap).sum(1)


def pair() -> tuple[Mixture, Mixture]:
    """The unconditional and the conditional mixture."""
    data = np.load(DATA)
    free, bound = (
        Mixture(*(torch.from_numpy(data[f"{p}_{k}"]) for k in ("w", "mu", "sd")))
        for p in ("gmm", "gmmc")
    )
    return free, bound


def guided(
    scale: float, mixtures: tuple[Mixture, Mixture] | None = None
) -> Callable[[Tensor, Level], Tensor]:
    """eps_u + scale·(eps_c − eps_u)."""
    free, bound = mixtures or pair()

    def eps(x: Tensor, level: Level) -> Tensor:
        u = free.eps(x, level)
        return u + scale * (bound.eps(x, level) - u)

    return eps


def exact(eps: Callable[[Tensor, Level], Tensor], x: Tensor, first: Level, last: Level) -> Tensor:
    """The ODE's end [B, D] from x at `first`: dz/du = eps, z = x/alpha, u = sigma/alpha."""

    def slope(u: float, z: np.ndarray) -> np.ndarray:
        a = 1 / math.sqrt(1 + u * u)
        rows = torch.from_numpy(z).reshape(x.shape) * a
        return eps(rows, Level(0, a, u * a)).numpy().ravel()

    ends = (first.sigma / first.alpha, last.sigma / last.alpha)
    start = (x / first.alpha).numpy().ravel()
    end = solve_ivp(slope, ends, start, "DOP853", rtol=1e-8, atol=1e-8).y[:, -1]
    return torch.from_numpy(end).reshape(x.shape) * last.alpha


def ours(spec: Any, eps: Any, x: Tensor, steps: int) -> tuple[Tensor, tuple[Level, ...]]:
    """The end of a run of exactly `steps` evaluations (Heun: at most), and its levels."""
    schedule = sampler.Schedule.from_config(
        {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}, "DDIMScheduler"
    )
    levels = schedule.grid((steps + 1) // 2 if spec == "heun" else steps)
    engine = sampler.Engine(sampler.denoiser(lambda x, level, _: eps(x, level)))
    return engine.run(x, levels, sampler=spec), levels


def stock(name: str, eps: Any, x: Tensor, steps: int) -> tuple[Tensor, tuple[Level, ...]]:
    """Run the same with a diffusers scheduler."""
    cls, options = STOCK[name]
    made = getattr(diffusers, cls)(**BETAS, timestep_spacing="leading", steps_offset=1, **options)
    if "final_sigmas_type" in made.config:
        made = type(made).from_config(made.config, final_sigmas_type="sigma_min")
    made.set_timesteps(steps)
    schedule = sampler.Schedule.from_config({**BETAS, "set_alpha_to_one": False}, "DDIMScheduler")
    levels = (*(schedule.level(int(t)) for t in made.timesteps), schedule.level(0))
    for t, level in zip(made.timesteps, levels[:-1], strict=True):
        x = made.step(eps(x, level), t, x).prev_sample
    return x, levels


def study(steps: tuple[int, ...] = STEPS, scales: tuple[float, ...] = SCALES) -> Iterator[dict]:
    """One row per sampler and setting: the root mean square error relative to the exact end."""
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known: dict[Any, Tensor] = {}
    for scale in scales:
        eps = guided(scale)
        for count in steps:
            for name in (*SAMPLERS, *STOCK):
                run = (
                    stock(name, eps, x, count)
                    if name in STOCK
                    else ours(SAMPLERS[name], eps, x, count)
                )
                end, levels = run
                key = (scale, levels[0])
                if key not in known:
                    known[key] = exact(eps, x, levels[0], levels[-1])
                gap = (end - known[key]).square().mean() / known[key].square().mean()
                yield {"sampler": name, "scale": scale, "steps": count, "error": float(gap.sqrt())}
