"""The momentum number: one float that names an order and a damping.

    order = ceil(m),   beta = m − (order − 1) in (0, 1]

An integer m is the plain multistep method of that order (beta = 1); 1.8 is order 2 with beta 0.8.
A smaller beta is more momentum: more stable, less accurate.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any, NamedTuple

from annotated_types import DocInfo, Gt, Le, Predicate

from sampler.core.binding import SamplerContext
from sampler.samplers.calibrated import calibration_key, look_up
from sampler.samplers.coefficients import MAX_ORDER
from sampler.types import Lin

DEFAULT = 1.8
CALIBRATED = "calibrated:"
Beta = Annotated[float, Gt(0), Le(1), DocInfo("1 is no momentum")]


def is_calibrated(number: object) -> bool:
    """True for "calibrated:FILE"."""
    return isinstance(number, str) and number.startswith(CALIBRATED)


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


@cache
def resolved(
    name: str, number: float | str | None, order: int | None, beta: float | None
) -> Momentum:
    """Order and beta from a momentum number, or from the two, or from what is given of them.

    The default is 1.8; a missing order or beta is that of 1.8. A calibration
    that is not looked up yet is 1.8 as well.

    Raises ValueError where the two forms contradict each other.
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


def require_number(name: str, number: float | str | None) -> None:
    """Raises ValueError for a calibration that has not been looked up for a model yet."""
    if is_calibrated(number):
        raise ValueError(
            f"{name}: momentum_number = {number!r} is looked up by generate(), for its model, "
            "steps and scale; give a number here."
        )


def bound_number(method: Any, context: SamplerContext) -> float | str | None:
    """The momentum number to run with; "calibrated:FILE" is looked up for a `SamplerContext`.

    Raises SamplerError (2) as `calibrated.look_up`.
    """
    number = method.momentum_number
    if not is_calibrated(number):
        return number
    key = calibration_key(method.name, context.levels, context.guidance)
    return look_up(number, context.fingerprint(), key)


def damped(beta: Any, velocity: Any, e: Lin) -> Lin:
    """(1 − beta)·velocity + beta·e; e itself at the start (None) and without momentum."""
    if velocity is None or (isinstance(beta, float) and beta == 1.0):
        return e
    return (1 - beta) * Lin.of(velocity) + beta * e


def _split(number: float) -> Momentum:
    order = math.ceil(number)
    return Momentum(order, round(number - (order - 1), 12))
