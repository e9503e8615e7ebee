"""Named grids: levels at places of the training table, or on a ramp between its ends.

Noise is sigma/alpha, on flow models sigma after the shift. i = 0 .. n − 1, table T_j rising, j = 0
.. N − 1, lo and hi its ends, u = i/(n − 1):

    simple            T at N − 1 − floor(i·N/n)
    sgm_uniform       times from t_hi to t_lo in n + 1 points, without the last
    normal            the same in n points
    ddim_uniform      T at 1 + (n − 1 − i)·floor(N/n)
    karras            (hi^{1/rho} + u·(lo^{1/rho} − hi^{1/rho}))^rho
    exponential       from hi to lo in equal steps of the logarithm
    polyexponential   lo·(hi/lo)^{(1 − u)^rho}
    beta              T at round(PPF(1 − i/n; alpha, beta)·(N − 1)): Beta Sampling, arXiv:2407.12173
    beta_sigmas       lo + PPF(1 − u; alpha, beta)·(hi − lo), as diffusers has it
    kl_optimal        tan(u·atan(lo) + (1 − u)·atan(hi))
    linear_quadratic  hi·(1 − c): linear to 0.025 over n//2 steps, then quadratic to 1 (Mochi)
    ays_*             the published levels of Align Your Steps, arXiv:2404.14507

A run has exactly n levels, all different: where rounding to the table would repeat one, the whole
grid is not rounded. With n = 1 it is the noisiest level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sampler.core.ramps import RAMPS, beta_quantiles

# NVIDIA's published noise levels, 11 for 10 steps.
AYS: Mapping[str, tuple[float, ...]] = {
    "ays_sd15": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.694615152, 1.8841921177, 1.3943805092,
        0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "ays_sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
        0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingLevels:
    """Training levels of a model: noise of every training time, rising.

    noise(t): at a place of the table, 0 .. N − 1, also between two. first, last: the places from
    which and to which `sgm_uniform` and `normal` go. kind: prediction of the model. ends: (low,
    high) of the ramps where a configuration has others than the table's.
    """

    table: Sequence[float]
    noise: Callable[[float], float]
    first: float
    last: float
    kind: str = "eps"
    ends: tuple[float | None, float | None] = (None, None)

    @property
    def low(self) -> float:
        return self.table[0] if self.ends[0] is None else self.ends[0]

    @property
    def high(self) -> float:
        known = next(v for v in reversed(self.table) if math.isfinite(v))
        return known if self.ends[1] is None else self.ends[1]


class Place(NamedTuple):
    """A level: its noise, and its place in the table where the grid has chosen that."""

    noise: float
    time: float | None = None


def _simple(n: int, N: int, options: Mapping[str, float]) -> list[float]:
    return [N - 1 - i * N / n for i in range(n)]


def _ddim_uniform(n: int, N: int, options: Mapping[str, float]) -> list[float]:
    step = N // n if 1 + (n - 1) * (N // n) < N else (N - 2) / (n - 1)
    return [1 + i * step for i in range(n)][::-1]


def _beta(n: int, N: int, options: Mapping[str, float]) -> list[float]:
    at = [1 - i / n for i in range(n)]
    return [p * (N - 1) for p in beta_quantiles(at, options["alpha"], options["beta"])]


def _ceil(t: float) -> int:
    return math.ceil(t - 1e-9)


# name -> (places before rounding, how they are rounded)
_PLACES: Mapping[str, tuple[Callable[..., list[float]], Callable[[float], int]]] = {
    "simple": (_simple, _ceil),
    "ddim_uniform": (_ddim_uniform, round),
    "beta": (_beta, round),
}
# Extra points of evenly spaced times that are left out at the end.
_TIMES = {"sgm_uniform": 1, "normal": 0}


def places(name: str, axis: TrainingLevels, n: int, options: Mapping[str, float]) -> list[Place]:
    """Return the n levels of a named grid, noisy first. Raises ValueError for `ays_*` elsewhere."""
    if name in AYS:
        return [Place(v) for v in _align_your_steps(name, axis, n)]
    N = len(axis.table)
    if name in RAMPS:
        ramp = RAMPS[name]
        return [Place(v) for v in (ramp(axis.low, axis.high, n, options) if n > 1 else [axis.high])]
    if n == 1:
        return [Place(axis.table[-1], N - 1)]
    if name in _TIMES:
        count = n + _TIMES[name]
        width = axis.last - axis.first
        times = [axis.first + i * width / (count - 1) for i in range(n)]
        return [Place(axis.noise(t), t) for t in times]
    choose, rounded = _PLACES[name]
    exact = choose(n, N, options)
    whole = [rounded(t) for t in exact]
    if len(set(whole)) == n:
        return [Place(axis.table[j], j) for j in whole]
    return [Place(axis.noise(t), t) for t in exact]


def _align_your_steps(name: str, axis: TrainingLevels, n: int) -> list[float]:
    published = AYS[name]
    kind = "v" if name == "ays_svd" else "eps"
    ends = zip((published[0], published[-1]), (axis.high, axis.low), strict=True)
    if axis.kind != kind or any(abs(own / end - 1) > 0.01 for end, own in ends):
        raise ValueError(
            f"grid = {name!r} is for another model: for {kind}-predictions on levels from "
            f"{published[0]:.4g} to {published[-1]:.4g}, and this one has {axis.kind}-predictions "
            f"on {axis.high:.4g} to {axis.low:.4g}; use 'karras' or 'beta'."
        )
    import numpy as np

    at = np.linspace(0, 1, n + 1)[:n]
    return np.exp(np.interp(at, np.linspace(0, 1, len(published)), np.log(published))).tolist()
