"""Heavy-ball momentum on a multistep method: momentum after the multistep sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sampler.registry import register
from sampler.samplers.coordinates import advance, euler
from sampler.samplers.dpmpp_2m import dpmpp_2m
from sampler.samplers.momentum import MomentumSampler, heavy_ball
from sampler.samplers.unipc import Compat, unipc
from sampler.types import Lin, Move, Prediction, Span


@register("sampler", "heavy_ball")
@dataclass(frozen=True)
class HeavyBall(MomentumSampler):
    """Heavy ball (HB): the slope of a multistep method, averaged over the steps.

        e_n = sum_j b_j·f_{n−j};   v_{n+1} = (1 − beta)·v_n + beta·e_n,   v_0 = f_0
        z_{n+1} = z_n + (u_{n+1} − u_n)·v_{n+1}

    z, u, f and b as for `ab`. Widens the stability interval of the base by (2 − beta)/beta, and is
    first order where beta < 1, whatever the base. beta = 1 is the base itself.

    base: "ab" (default) in eps- or flow-space; "dpmpp_2m" and "unipc" in data-space, where e is
        their second-order combination of x0 (the corrector's for UniPC).
    momentum_number: its ceiling is the order of the sum, the rest beta; default 1.8. For
        dpmpp_2m and unipc the order is 2. "calibrated:FILE" as for `ghvb`.
    order: of the multistep sum; the other form, with beta. beta: damping, with order.
    space: as for `ab`. It applies to the base "ab" alone.
    compat: "published" averages UniPC's slope divided by sigma, as the published code does, which
        biases a constant x0 towards 0; "clean" (default) averages the slope itself.
    """

    base: Literal["ab", "dpmpp_2m", "unipc"] = "ab"
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

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if self.base == "dpmpp_2m":
            return dpmpp_2m(pred, span, state, self.momentum.beta)
        if self.base == "unipc":
            return unipc(pred, span, state, self.momentum.beta, self.compat)
        _, after = heavy_ball(self, pred, span, state)
        if not state:
            return Move(euler(pred, span), 0.0, after)
        return Move(advance(pred, span, Lin.of(after.velocity), self.space), 0.0, after)
