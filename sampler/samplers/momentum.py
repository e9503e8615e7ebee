"""Momentum samplers: their common fields, and the momentum number that names order and damping.

    order = ceil(m),   beta = m − (order − 1) in (0, 1]

An integer m is the plain multistep method of that order (beta = 1); 1.8 is order 2 with beta 0.8.
A smaller beta is more momentum: more stable, less accurate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from annotated_types import DocInfo, Gt, Le, Predicate

from sampler.core.binding import SamplerContext
from sampler.samplers.calibrated import key_of, look_up
from sampler.samplers.coefficients import MAX_ORDER, Order, adams_bashforth
from sampler.samplers.coordinates import Space, check_space, damped, slope, weighted
from sampler.types import Level, Lin, Prediction, SamplerBase, Span

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT = 1.8
CALIBRATED = "calibrated:"


def is_calibrated(number: object) -> bool:
    """True for "calibrated:FILE"."""
    return isinstance(number, str) and number.startswith(CALIBRATED)


Beta = Annotated[float, Gt(0), Le(1), DocInfo("1 is no momentum")]
MomentumNumber = (
    Annotated[float, Gt(0), Le(MAX_ORDER), DocInfo("its ceiling is the order, the rest is beta")]
    | Annotated[str, Predicate(is_calibrated), DocInfo(f"'{CALIBRATED}FILE'")]
)


class Momentum(NamedTuple):
    """Order 1 to 5 of the multistep sum, and damping beta in (0, 1]."""

    order: int
    beta: float

    @property
    def number(self) -> float:
        return self.order - 1 + self.beta


@dataclass(frozen=True)
class MomentumSampler(SamplerBase):
    """Fields that the momentum samplers share; see `ghvb`."""

    momentum_number: MomentumNumber | None = None
    order: Order | None = None
    beta: Beta | None = None
    space: Space = "auto"

    def __post_init__(self) -> None:
        self.momentum  # noqa: B018 - raises where the two forms contradict each other

    @property
    def momentum(self) -> Momentum:
        """Order and beta."""
        return resolved(self.name, self.momentum_number, self.order, self.beta)

    @property
    def convergence(self) -> float:
        return float(self.momentum.order) if self.momentum.beta == 1 else 1.0

    def bind(self, context: SamplerContext) -> Self:
        """Looks a calibrated number up for the model and the run.

        Raises SamplerError (2) as `calibrated.look_up`.
        """
        number = self.momentum_number
        if not (isinstance(number, str) and is_calibrated(number)):
            return self
        key = key_of(self.name, context.levels, context.guidance)
        return replace(self, momentum_number=look_up(number, context.fingerprint(), key))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        if is_calibrated(self.momentum_number):
            raise ValueError(
                f"{self.name}: momentum_number = {self.momentum_number!r} is looked up by "
                "generate(), for its model, steps and scale; give a number here."
            )
        check_space(self.name, self.space, grid)
        return grid


class HeavyBallState(NamedTuple):
    """Velocity v, and the last slopes f, newest first."""

    velocity: Any
    slopes: tuple[Any, ...]


def heavy_ball(
    sampler: MomentumSampler, pred: Prediction, span: Span, state: HeavyBallState | tuple[()]
) -> tuple[Lin, HeavyBallState]:
    """(e_n, next state):  e_n = sum_j b_j·f_{n−j},   v_{n+1} = (1 − beta)·v_n + beta·e_n."""
    order, beta = sampler.momentum
    velocity, history = state or (None, ())
    slopes = (slope(pred, span, sampler.space), *history)[:order]
    e = weighted(adams_bashforth(len(slopes)), slopes)
    return e, HeavyBallState(damped(beta, velocity, e), slopes[: order - 1])


def resolved(
    name: str, number: float | str | None, order: int | None, beta: float | None
) -> Momentum:
    """Order and beta from a momentum number, or from the two, or from one of the two.

    The default is 1.8, and completes order or beta; a calibrated number that is not looked up yet
    counts as 1.8. Raises ValueError where the two forms contradict each other.
    """
    if isinstance(number, str):
        if order is not None or beta is not None:
            raise ValueError(f"{name}: give either {number!r} or order and beta.")
        return _split(DEFAULT)
    split = _split(DEFAULT if number is None else number)
    if number is None:
        return Momentum(order or split.order, split.beta if beta is None else beta)
    if (order is not None and order != split.order) or (
        beta is not None and abs(beta - split.beta) > 1e-9
    ):
        raise ValueError(
            f"{name}: momentum_number = {number} is order {split.order} with beta {split.beta:g}, "
            f"which contradicts order = {order}, beta = {beta}; give one of the two forms."
        )
    return split


def _split(number: float) -> Momentum:
    order = math.ceil(number)
    return Momentum(order, round(number - (order - 1), 12))
