"""Laws of the noise levels of training.

A law turns a uniform number u in [0, 1) into a share f of the training time, 0 (image) to 1
(noise), by its quantile function; progress p is the share of the run's updates that are done. A
draw is therefore a function of u alone, and a resumed run repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from annotated_types import DocInfo, Predicate

from sampler.registry import suggestion
from sampler.registry.constraints import Fraction, Positive, checked
from sampler.training.time_shares import share_of

if TYPE_CHECKING:
    from sampler.core.schedule import Schedule

_TINY = 1e-9  # quantiles of unbounded laws are taken at u in [_TINY, 1 − _TINY]


class TimeLaw:
    """Base of the laws. scheduled: True for a law that changes during the run."""

    name: ClassVar[str]
    scheduled: ClassVar[bool] = False

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        """Return the share f of the training time, the quantile of the law at u in [0, 1)."""
        raise NotImplementedError


@checked("uniform")
@dataclass(frozen=True)
class Uniform(TimeLaw):
    """f ~ U(0, 1)."""

    name: ClassVar[str] = "uniform"

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        return u


@checked("logit_normal")
@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """f = sigmoid(n), n ~ N(m, s²): the middle of the training time.

    Source: Scaling Rectified Flow Transformers (Esser et al., 2024), arXiv:2403.03206, section 3.1.
    """

    m: float = 0.0
    s: Positive = 1.0

    name: ClassVar[str] = "logit_normal"

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        return _sigmoid(self.m + self.s * NormalDist().inv_cdf(_inside(u)))


@checked("movis")
@dataclass(frozen=True)
class Movis(TimeLaw):
    """1000·f ~ N(mu(p), std²), truncated to [0, 1000): noise first, the middle later.

        mu = 1000 for p < p1,   falls linearly to 500 at p2,   500 after

    std: in thousandths of the training time.
    Source: MOVIS (Lu et al., 2024), arXiv:2412.11457, and its published code, whose mu changes at
    logged epochs 55 and 80.
    """

    p1: Fraction = 0.55
    p2: Fraction = 0.8
    std: Positive = 200.0

    name: ClassVar[str] = "movis"
    scheduled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.p1 > self.p2:
            raise ValueError(f"movis: p1 = {self.p1:g} must be at most p2 = {self.p2:g}.")

    def mu(self, progress: float) -> float:
        """Return the mean of the normal before its truncation, in thousandths."""
        if progress < self.p1:
            return 1000.0
        if progress >= self.p2:
            return 500.0
        return 1000.0 - 500.0 * (progress - self.p1) / (self.p2 - self.p1)

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        normal = NormalDist(self.mu(progress), self.std)
        low, high = normal.cdf(0.0), normal.cdf(1000.0)
        return min(max(normal.inv_cdf(low + u * (high - low)) / 1000, 0.0), 1.0)


def _is_stages(stages: tuple[tuple[float, float, float], ...]) -> bool:
    ranges = all(part > 0 and 0 <= low < high <= 1 for part, low, high in stages)
    return ranges and math.isclose(sum(part for part, _, _ in stages), 1.0, abs_tol=1e-6)


Stages = Annotated[
    tuple[tuple[float, float, float], ...],
    Predicate(_is_stages),
    DocInfo("a list of (part, low, high) whose parts add up to 1, with 0 <= low < high <= 1"),
]


@checked("pieces")
@dataclass(frozen=True)
class Pieces(TimeLaw):
    """f ~ U(low, high), with a range for every part of the run.

    stages: (part of the run, low, high), one after the other; the parts add up to 1.
    """

    stages: Stages = ((1.0, 0.0, 1.0),)

    name: ClassVar[str] = "pieces"
    scheduled: ClassVar[bool] = True

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        end = 0.0
        for part, low, high in self.stages:
            end += part
            if progress < end - 1e-9:
                return low + u * (high - low)
        _, low, high = self.stages[-1]
        return low + u * (high - low)


@checked("laplace")
@dataclass(frozen=True)
class Laplace(TimeLaw):
    """log(alpha²/sigma²) ~ Laplace(m, b): levels around one signal-to-noise ratio.

    Levels outside the model's are moved to its nearest one.
    Source: Improved Noise Schedule for Diffusion Training (Hang & Gu, 2024), arXiv:2407.03297.
    """

    m: float = 0.0
    b: Positive = 0.5

    name: ClassVar[str] = "laplace"

    def share(self, u: float, progress: float, schedule: Schedule) -> float:
        side = _inside(u) - 0.5
        log_snr = self.m - self.b * math.copysign(math.log1p(-2 * abs(side)), side)
        return share_of(schedule, math.exp(-log_snr / 2))


LAWS: dict[str, type[TimeLaw]] = {
    law.name: law for law in (Uniform, LogitNormal, Movis, Pieces, Laplace)
}


def time_law(spec: Any, owner: str) -> TimeLaw:
    """Return a law from its name, from {"name": ..., field: ...}, or the instance itself.

    Raises ValueError for an unknown law or field, and for a value out of range; `owner` is the
    setting that the message names.
    """
    if isinstance(spec, TimeLaw):
        return spec
    given = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(
            f"{owner} is a name or a mapping with 'name', one of {', '.join(LAWS)}, not "
            f"{spec!r:.60}."
        )
    values = dict(cast("Mapping[str, Any]", given))
    name = values.pop("name")
    if name not in LAWS:
        raise ValueError(f"{owner}: unknown law {name!r}{suggestion(name, LAWS)}.")
    cls: Any = LAWS[name]
    known = [entry.name for entry in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{owner}: {name!r} has no field {key!r}{suggestion(key, known)}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _inside(u: float) -> float:
    return min(max(u, _TINY), 1 - _TINY)
