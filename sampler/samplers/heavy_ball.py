"""Heavy-ball momentum on a multistep method: momentum after the multistep sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.samplers.coefficients import Order, adams_bashforth
from sampler.samplers.coordinates import Space, advance, check_space, euler, slope, weighted
from sampler.samplers.dpmpp import second_order
from sampler.samplers.exponential import line
from sampler.samplers.momentum import (
    Beta,
    Momentum,
    MomentumNumber,
    bound_number,
    damped,
    require_number,
    resolved,
)
from sampler.samplers.unipc import Compat, unipc
from sampler.types import Level, Move, Prediction, SamplerBase, Span


@register("sampler", "heavy_ball")
@dataclass(frozen=True)
class HeavyBall(SamplerBase):
    """Heavy ball (HB): the slope of a multistep method, averaged over the steps.

        e_n = sum_j b_j·f_{n−j};   v_{n+1} = (1 − beta)·v_n + beta·e_n,   v_0 = f_0
        z_{n+1} = z_n + (u_{n+1} − u_n)·v_{n+1}

    z, u, f and b as for `ab`. Widens the stability interval of the base by (2 − beta)/beta, and is
    first order where beta < 1, whatever the base. beta = 1 is the base itself.

    base: "ab" (default) in eps- or flow-space; "dpmpp_2m" and "unipc" in data-space, where e is
        their second-order combination of x0 (the corrector's for UniPC).
    momentum_number: (0, 5], its ceiling is the order of the sum, the rest beta; default 1.8. For
        dpmpp_2m and unipc the order is 2. "calibrated:FILE" as for `ghvb`.
    order: 1 to 5, the other form; it goes with beta. beta: (0, 1], with order.
    space: as for `ab`. It belongs to the base "ab" alone.
    compat: "published" averages UniPC's slope divided by sigma, as the published code does, which
        biases a constant x0 towards 0; "clean" (default) averages the slope itself.
    """

    momentum_number: MomentumNumber | None = None
    base: Literal["ab", "dpmpp_2m", "unipc"] = "ab"
    order: Order | None = None
    beta: Beta | None = None
    space: Space = "auto"
    compat: Compat = "clean"

    reference: ClassVar[str] = (
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts "
        "(Wizadwongsa et al., 2024), arXiv:2307.11118, Algorithm 1"
    )

    def __post_init__(self) -> None:
        if self.base != "ab" and self.space not in ("auto", "data"):
            raise ValueError(
                f"heavy_ball: space = {self.space!r} must be 'auto' or 'data' with base = "
                f"{self.base!r}."
            )
        if self.compat == "published" and self.base != "unipc":
            raise ValueError("heavy_ball: compat = 'published' needs base = 'unipc'.")
        if self.momentum.order != 2 and self.base != "ab":
            raise ValueError(
                f"heavy_ball: base = {self.base!r} is of order 2, not {self.momentum.order}; "
                "give beta, or a momentum_number above 1 and up to 2."
            )

    @property
    def momentum(self) -> Momentum:
        """Order and beta."""
        return resolved("heavy_ball", self.momentum_number, self.order, self.beta)

    @property
    def follows_direction(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base != "unipc"

    @property
    def convergence(self) -> float:
        return float(self.momentum.order) if self.momentum.beta == 1 else 1.0

    def bind(self, context: SamplerContext) -> HeavyBall:
        """With the calibrated number of this model and run, where one is requested."""
        return replace(self, momentum_number=bound_number(self, context))

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        require_number("heavy_ball", self.momentum_number)
        check_space("heavy_ball", self.space, grid)
        return grid

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        order, beta = self.momentum
        if self.base == "dpmpp_2m":
            return _dpmpp_2m(pred, span, state, beta)
        if self.base == "unipc":
            return unipc(pred, span, state, beta=beta, compat=self.compat)
        velocity, history = state or (None, ())
        slopes = (slope(pred, span, self.space), *history)[:order]
        v = damped(beta, velocity, weighted(adams_bashforth(len(slopes)), slopes))
        kept = (v, slopes[: order - 1])
        if not state:
            return Move(euler(pred, span), 0.0, kept)
        return Move(advance(pred, span, v, self.space), 0.0, kept)


def _dpmpp_2m(pred: Prediction, span: Span, state: Any, beta: float) -> Move:
    """DPM-Solver++(2M) along the averaged target; first-order steps neither use nor change it."""
    history, velocity = state or ((), None)
    e, history = second_order(pred, span, history)
    if e is None:
        return Move(line(pred, span), 0.0, (history, velocity))
    v = damped(beta, velocity, e)
    return Move(line(pred, span, v), 0.0, (history, v if beta != 1 else None))
