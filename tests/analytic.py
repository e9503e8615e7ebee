"""Models with exact answers, for laws and formulas: Gaussian mixtures under any noise level.

p0(x) = sum_k w_k N(x; mu_k, sd_k^2 I),   x_t = alpha x0 + sigma eps
var_k = alpha^2 sd_k^2 + sigma^2
eps(x) = sigma sum_k r_k (x − alpha mu_k) / var_k,   r = softmax(log w_k + log N_k)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import sampler
from sampler.types import Level


@dataclass(frozen=True)
class Mixture:
    """Weights w [K], means mu [K, D], standard deviations sd [K]; rows [B, ...] of D elements."""

    w: Tensor
    mu: Tensor
    sd: Tensor

    def eps(self, x: Tensor, level: Level) -> Tensor:
        rows = x.flatten(1)
        a = torch.as_tensor(level.alpha, dtype=x.dtype).reshape(-1, 1, 1)
        s = torch.as_tensor(level.sigma, dtype=x.dtype).reshape(-1, 1, 1)
        var = (a[..., 0] * self.sd) ** 2 + s[..., 0] ** 2
        gap = rows[:, None, :] - a * self.mu
        log = self.w.log() - rows.shape[1] / 2 * var.log() - (gap**2).sum(-1) / (2 * var)
        r = log.softmax(1)
        return (s[..., 0] * ((r / var)[..., None] * gap).sum(1)).reshape(x.shape)

    def out(self, x: Tensor, level: Level, prediction: str) -> Tensor:
        """The exact output of a network of this parametrisation."""
        a, s = level.alpha, level.sigma
        eps = self.eps(x, level)
        if prediction == "eps":
            return eps
        x0 = (x - s * eps) / a
        return {"x0": x0, "v": a * eps - s * x0, "velocity": eps - x0}[prediction]


def mixture(dim: int, seed: int = 0, count: int = 3, spread: float = 1.5) -> Mixture:
    """A random mixture in `dim` dimensions, float64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(count, generator=g, dtype=torch.float64) + 0.5
    mu = spread * torch.randn(count, dim, generator=g, dtype=torch.float64)
    sd = 0.3 + 0.4 * torch.rand(count, generator=g, dtype=torch.float64)
    return Mixture(w / w.sum(), mu, sd)


def pair_denoiser(cond: Mixture, uncond: Mixture, prediction: str = "eps"):
    """A denoiser over two mixtures; its conditions are tensors [B]: 1 is `cond`, 0 is `uncond`."""

    def fn(x, level, which):
        yes = cond.out(x, level, prediction)
        no = uncond.out(x, level, prediction)
        return torch.where(which.view(-1, *(1,) * (x.ndim - 1)) > 0.5, yes, no)

    return sampler.denoiser(fn, prediction)


def pair_cond(rows: int) -> sampler.Cond:
    """The conditions of `pair_denoiser` for B rows."""
    return sampler.Cond(cond=torch.ones(rows), uncond=torch.zeros(rows))


def vp_grid(steps: int, start: int = 900):
    """A grid on the scaled-linear schedule, down to sigma = 0 (steps + 1 levels)."""
    schedule = sampler.Schedule.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
        },
        "DDIMScheduler",
    )
    times = torch.linspace(start, 1, steps).round().int().tolist()
    # The table is float32; here alpha² + sigma² = 1 has to hold in float64.
    alphas = [(t, schedule.level(t).alpha) for t in times]
    return (*(Level(t, a, (1 - a * a) ** 0.5) for t, a in alphas), Level(0, 1.0, 0.0))


def sigma_grid(steps: int, high: float = 8.0, low: float = 0.5):
    """VP levels whose sigma/alpha falls in equal steps from high to low (steps + 1 levels)."""
    ratios = torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist()
    alphas = [1 / (1 + r * r) ** 0.5 for r in ratios]
    return tuple(Level(r, a, r * a) for r, a in zip(ratios, alphas, strict=True))


def flow_grid(steps: int, high: float = 1.0, low: float = 0.0):
    """Flow levels, alpha = 1 − sigma, in equal steps (steps + 1 levels)."""
    sigmas = torch.linspace(high, low, steps + 1, dtype=torch.float64).tolist()
    return tuple(Level(1000 * s, 1 - s, s) for s in sigmas)
