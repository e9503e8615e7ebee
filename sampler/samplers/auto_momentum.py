"""A momentum number per row, chosen once, from what the first steps of the run showed (ours).

While the number is open, the row runs with 1.8. From each of the first steps there is a secant
estimate of the slope's Lipschitz constant L, and with it of the stiffness of the step to come:

    s_n = |f_n − f_{n−1}| / |e_{n−1}| · |u_{n+1} − u_n| / |u_n − u_{n−1}|        (L·|step|)

e_{n−1} is the slope that the step before moved along. After two of them

    T = max(s_1, s_2)·(12/N)²,     number = interpolated over log T in KNOTS

N is the number of steps: with fewer of them the later steps, which are the stiff ones under strong
guidance, are longer. The velocities are then recomputed from the slopes with the chosen damping, so
that the average is that of one number, and the number stays. Changing it at every step does worse.

KNOTS and the power of N were fitted on the guided mixture of docs/samplers.md, and checked on
others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sampler_kernels import gram

from sampler.samplers.coefficients import GAMMA, ghvb
from sampler.samplers.coordinates import Space, advance, clock, euler, slope, space_of, weighted
from sampler.samplers.momentum import DEFAULT, damped
from sampler.types import Lin, Move, Prediction, Span

if TYPE_CHECKING:
    from torch import Tensor

# (T, momentum number); below the first and above the last the number stays. Numbers lie in (1, 3].
KNOTS = ((0.045, 2.5), (0.077, 2.2), (0.141, 1.9), (0.288, 1.7), (0.768, 1.4))
SECANTS = 2


class Search(NamedTuple):
    """A run whose number is open (slopes) or chosen (number [B], velocities), newest first."""

    slopes: tuple[Any, ...]
    velocities: tuple[Any, ...]
    moved: Any  # the slope that the last step moved along
    step: float  # its u' − u; not finite at a level without signal
    peak: Any  # the largest s so far [B], None before the first
    secants: int
    number: Any


def auto_step(pred: Prediction, span: Span, state: Any, space: Space) -> Move:
    """One step of GHVB with momentum_number = "auto"."""
    kind = space_of(span, space)
    f, step = slope(pred, span, space), clock(span.next, kind) - clock(span.now, kind)
    if not state:
        return Move(euler(pred, span), 0.0, Search((f,), (), f, step, None, 0, None))
    if state.number is not None:
        return _chosen(pred, span, state, space, f)
    slopes = (f, *state.slopes)
    peak, secants = state.peak, state.secants
    if math.isfinite(state.step):
        rise = gram(f - Lin.of(state.slopes[0]))[0, 0].sqrt()
        along = gram(Lin.of(state.moved))[0, 0].sqrt()
        s = rise / along.clamp(min=1e-30) * abs(step / state.step)
        peak, secants = s if peak is None else s.maximum(peak), secants + 1
    if secants < SECANTS:
        beta = DEFAULT - 1
        velocities = _replayed(slopes, beta)[:2]
        e = weighted(ghvb(len(velocities), beta), velocities)
        after = Search(slopes, (), e, step, peak, secants, None)
        return Move(advance(pred, span, e, space), 0.0, after)
    number = number_of(peak, span.total)
    velocities = _replayed(slopes, _beta(number))[1:3]
    found = Search((), velocities, None, step, None, secants, number)
    return _chosen(pred, span, found, space, f)


def number_of(peak: Tensor, steps: int) -> Tensor:
    """The momentum number [B] of rows whose first stiffness was `peak` [B], in `steps` steps."""
    t = (peak * (12 / (steps or 12)) ** 2).clamp(min=1e-30).log()
    number = t * 0 + KNOTS[0][1]
    for (low, one), (high, other) in zip(KNOTS, KNOTS[1:], strict=False):
        share = ((t - math.log(low)) / math.log(high / low)).clamp(0, 1)
        number = number + share * (other - one)
    return number


def _chosen(pred: Prediction, span: Span, state: Search, space: Space, f: Lin) -> Move:
    beta = _beta(state.number)
    velocities = (damped(beta, state.velocities[0], f), *state.velocities)[:3]
    e = weighted(_coefficients(state.number, beta), velocities)
    after = state._replace(velocities=velocities[:2])
    return Move(advance(pred, span, e, space), 0.0, after)


def _replayed(slopes: Sequence[Any], beta: Any) -> tuple[Any, ...]:
    """All velocities of the slopes so far, both newest first."""
    v, velocities = None, []
    for f in reversed(slopes):
        v = damped(beta, v, Lin.of(f))
        velocities.insert(0, v)
    return tuple(velocities)


def _beta(number: Tensor) -> Tensor:
    return number - number.ceil() + 1


def _coefficients(number: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`coefficients.ghvb` of order 2 or 3 per row: [B] each."""
    ratio = (1 - beta) / beta
    d1 = GAMMA[1] + ratio
    d2 = (GAMMA[2] + ratio * GAMMA[1]) * (number > 2)
    return 1 + d1 + d2, -d1 - 2 * d2, d2
