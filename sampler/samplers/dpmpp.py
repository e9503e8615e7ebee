"""The DPM-Solver++ family: multistep methods on x0, with the step of `exponential.py`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge

from sampler.registry import register
from sampler.registry.constraints import Nonnegative
from sampler.samplers.exponential import (
    Clock,
    History,
    extrapolated,
    falling,
    line,
    next_order,
    noisy,
)
from sampler.samplers.multistep_weights import flat, moments, solved, weights
from sampler.samplers.shares import NoiseKind, share
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

Eta = Annotated[float, Ge(0), DocInfo("0 is deterministic")]
Solver = Literal["midpoint", "heun"]
RULES = {"midpoint": flat, "heun": weights}

# Stock and published DPM-Solver++ end with a first-order step in runs shorter than this.
SHORT_RUN = 15
# Below this number of steps the bundled model misses prompts that it meets with others
# (docs/samplers.md, quality against evaluations).
MIN_STEPS_3M = 25


class DataMultistep(SamplerBase):
    """Common part of multistep samplers on x0; a subclass is a dataclass with its weights."""

    follows_direction: ClassVar[bool] = True
    eta: float = 0.0
    s_noise: float = 1.0
    noise: NoiseKind = "step"
    order: int = 2
    clock: Clock = "snr"

    @property
    def convergence(self) -> float | None:
        return None if self.stochastic else 2.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid itself. Raises ValueError for a level that is not below the one before."""
        return falling(self.name, grid)

    def node_weights(self, places: tuple[float, ...], H: float) -> Sequence[float]:
        """Weights of the values at `places` of a step."""
        return weights(places, H)

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        k, fresh = share("sde", span, self.eta)
        rule, clock = self.node_weights, self._clock
        e, history = extrapolated(pred, span, state, self.order, rule, k, clock)
        return noisy(self, line(pred, span, e, k), span, fresh, history)

    def error_term(self, pred: Prediction, move: Move, span: Span, state: Any) -> Lin:
        return pred.x0

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        k = share("sde", spans[-1], self.eta).k
        return next_order(spans, self.order, self.node_weights, k, self._clock)

    @property
    def _clock(self) -> Clock:
        return "snr" if self.stochastic else self.clock


def second_order(
    pred: Prediction, span: Span, history: History, kind: Solver = "midpoint", clock: Clock = "snr"
) -> tuple[Lin | None, History]:
    """(e, history) of DPM-Solver++(2M); first order, e = None, at the start and in a short end."""
    e, history = extrapolated(pred, span, history, 2, RULES[kind], clock=clock)
    return (None if _short_end(span) else e), history


def _short_end(span: Span) -> bool:
    return span.index == span.total - 1 and span.total < SHORT_RUN


@register("sampler", "dpmpp_2m")
@dataclass(frozen=True)
class DPMSolverPP2M(DataMultistep):
    """DPM-Solver++(2M): second order in log-SNR on the predicted x0.

        e = m + (m − m_before)·h/(2·h_before);   x' = (sigma'/sigma)·x − alpha'·(e^{−h} − 1)·e

    h is the step in lambda = log(alpha/sigma), m = x0. The first step is first order (DDIM), and
    so is the last where it ends at sigma' = 0, or in runs of fewer than 15 steps.

    solver_type: "midpoint" (default), as above; "heun" averages the line through m_before and m
        with the kernel e^{hs} of the exact solution, which is RES.
    clock: the coordinate in which the line is drawn: "snr" (default), lambda; "sigma", −ln sigma on
        flow models, as ComfyUI has it; "auto", sigma on flow models.
    """

    solver_type: Solver = "midpoint"
    clock: Clock = "snr"

    reference: ClassVar[str] = "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, Algorithm 2"

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        e, history = second_order(pred, span, state, self.solver_type, self.clock)
        return Move(line(pred, span, e), 0.0, history)

    def node_weights(self, places: tuple[float, ...], H: float) -> Sequence[float]:
        return RULES[self.solver_type](places, H)

    def error_weights(self, spans: Sequence[Span]) -> tuple[float, ...]:
        taken = 1 if _short_end(spans[-1]) else 2
        return next_order(spans, 2, self.node_weights, clock=self.clock, taken=taken)


@register("sampler", "dpmpp_2m_sde")
@dataclass(frozen=True)
class DPMSolverPP2MSDE(DataMultistep):
    """SDE-DPM-Solver++(2M): `dpmpp_2m` with fresh noise in every step.

        x' = c·x + (alpha' − c·alpha)·e + s_noise·sigma'·sqrt(1 − k²)·z,   c = k·sigma'/sigma
        k = e^{−eta·h},   e = w_0·m + w_1·m_before,   w_1 = −h/(2·h_before)

    m, h and the first step as for `dpmpp_2m`; z ~ N(0, I). Below 15 steps it adds grain.

    eta: amount of noise, at least 0; 1 (default) is the SDE of the paper, 0 is `dpmpp_2m`.
    s_noise: factor on the noise; 1 keeps the level's amount.
    solver_type: "midpoint" (default), as above; "heun" has the weights of the exact kernel.
    noise: as for `ddim`.
    """

    eta: Eta = 1.0
    s_noise: Nonnegative = 1.0
    solver_type: Solver = "midpoint"
    noise: NoiseKind = "step"

    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, eq. 14; k-diffusion's "
        "sample_dpmpp_2m_sde"
    )

    def node_weights(self, places: tuple[float, ...], H: float) -> Sequence[float]:
        return RULES[self.solver_type](places, H)


@register("sampler", "dpmpp_3m_sde")
@dataclass(frozen=True)
class DPMSolverPP3MSDE(DataMultistep):
    """DPM++ 3M SDE: a parabola through the last three predictions of x0, with fresh noise.

        e = m + M_1(H)·d_1 + c_2·M_2(H)·d_2,   m + d_1·s + d_2·s² through the three, step = 0..1
        M_m(H) = ∫ e^{Hs}·s^m ds / ∫ e^{Hs} ds over 0..1,   H = (1 + eta)·h

    The step is that of `dpmpp_2m_sde`; the first is of order 1, the second of order 2. Use 25
    steps or more: with fewer it overshoots.

    weights: "published" (default) has c_2 = 1/2, as every published code; it is second order, and
        damps at few steps. "exact", c_2 = 1, is third order.
    eta, s_noise, noise: as for `dpmpp_2m_sde`; eta 0 is the deterministic method.
    """

    eta: Eta = 1.0
    s_noise: Nonnegative = 1.0
    weights: Literal["published", "exact"] = "published"
    noise: NoiseKind = "step"

    reference: ClassVar[str] = (
        "DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095; k-diffusion's sample_dpmpp_3m_sde"
    )
    order = 3

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        if self.stochastic:
            warn_short_run(MIN_STEPS_3M, "dpmpp_3m_sde overshoots", span, "er_sde")
        return super().step(x, pred, span, state)

    def node_weights(self, places: tuple[float, ...], H: float) -> Sequence[float]:
        return (_halved if self.weights == "published" else weights)(places, H)


def warn_short_run(least: int, what: str, span: Span, instead: str) -> None:
    """Warn at the first of several steps, if a run has fewer than `least`."""
    if span.index == 0 and 1 < span.total < least:
        warnings.warn(
            f"{what} in runs of fewer than {least} steps (this one has {span.total}); use more, or "
            f"{instead}.",
            stacklevel=3,
        )


def _halved(places: Sequence[float], H: float) -> tuple[float, ...]:
    """Weights of a parabola whose quadratic term is halved, as in the published third order."""
    values = moments(H, len(places))
    return solved(places, [*values[:2], *(v / 2 for v in values[2:])])
