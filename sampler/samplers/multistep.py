"""Adams-Bashforth (PLMS) on the probability-flow ODE, in the coordinates of `coordinates.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from sampler.registry import register
from sampler.samplers.coefficients import Order, adams_bashforth
from sampler.samplers.coordinates import (
    Space,
    advance,
    carried,
    check_space,
    clock,
    euler,
    gain,
    slope,
    space_of,
    weighted,
)
from sampler.samplers.multistep_weights import places, weights
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


class ABState(NamedTuple):
    """The last slopes with their clocks u, newest first; `gain` of the very first step."""

    slopes: tuple[Any, ...]
    clocks: tuple[float, ...]
    gain: float | None


@register("sampler", "ab")
@dataclass(frozen=True)
class AdamsBashforth(SamplerBase):
    """Adams-Bashforth (PLMS): extrapolates the last slopes; one evaluation per step.

        z' = z + (u' − u)·sum_j b_j·f_{n−j},   b from (1 + D/2 + 5/12·D² + 3/8·D³ + 251/720·D⁴)
        z = x/alpha, u = sigma/alpha, f = eps;   on a flow model z = x, u = sigma, f = velocity

    D is the backward difference, D f_n = f_n − f_{n−1}; the sum has `order` terms.
    The first steps use the order that the history allows, so the first one is DDIM's.

    order: 1 (DDIM) to 5; 4 is PLMS as published.
    steps: "fixed" (published) assumes equal steps in u; on other grids every order above 2 falls
        back to 2. "variable" (ours) integrates the polynomial through the slopes at their own u,
        and corrects the first step by the trapezoidal rule as soon as the second slope is there
        (no extra evaluation). Its order is `order` up to 3; the start limits it to 3 above.
    space: the coordinate of z, u and f: "eps" or "flow", as above, or "data", z = x/sigma, u =
        alpha/sigma, f = x0; "auto" is eps, or flow on a flow model. Flow is refused on others.
    """

    order: Order = 4
    steps: Literal["fixed", "variable"] = "fixed"
    space: Space = "auto"

    follows_direction: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), "
        "arXiv:2202.09778, eq. 9"
    )

    @property
    def convergence(self) -> float:
        return float(self.order if self.steps == "fixed" else min(self.order, 3))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        check_space("ab", self.space, grid)
        return grid

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if self.steps == "variable" and self.order > 1:
            return self._variable(pred, span, state)
        slopes = (slope(pred, span, self.space), *state)[: self.order]
        kept = slopes[: self.order - 1]
        if len(slopes) == 1:
            return Move(euler(pred, span), 0.0, kept)
        e = weighted(adams_bashforth(len(slopes)), slopes)
        return Move(advance(pred, span, e, self.space), 0.0, kept)

    def _variable(self, pred: Prediction, span: Span, state: Any) -> Move:
        space = space_of(span, self.space)
        u, end = clock(span.now, space), clock(span.next, space)
        f = slope(pred, span, self.space)
        if not (math.isfinite(u) and math.isfinite(end)):
            # A slope at infinite u is no node of a polynomial: the history starts one step later.
            return Move(euler(pred, span), 0.0, ())
        if not state:
            return Move(euler(pred, span), 0.0, ABState((f,), (u,), gain(span, self.space)))
        slopes, clocks = (f, *state.slopes)[: self.order], (u, *state.clocks)[: self.order]
        e = weighted(weights(places(clocks, end), 0.0), slopes)
        mean = advance(pred, span, e, self.space)
        if state.gain is not None:  # x was Euler's; x + gain/2·(f − f_0) is the trapezoidal rule's
            late = f - Lin.of(state.slopes[0])
            mean = mean + carried(span, self.space) * state.gain / 2 * late
        keep = self.order - 1
        return Move(mean, 0.0, ABState(slopes[:keep], clocks[:keep], None))
