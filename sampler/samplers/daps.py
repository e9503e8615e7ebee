"""DAPS: posterior samples of an inverse problem, by annealing decoupled from the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.registry.constraints import Count, Positive
from sampler.samplers.measurement import (
    MIN_ALPHA,
    Measurement,
    Range,
    measurement,
    posterior_variance,
)
from sampler.types import Level, Move, Prediction, SamplerBase, Span


@register("sampler", "daps")
@dataclass(frozen=True, eq=False)
class DAPS(SamplerBase):
    """Decoupled annealing: at every level a draw of x0 given x and y, noised to the next level.

        c  = D + r·n_x,   ỹ = y + s·n_y,   r² = v·sigma²/(v·alpha² + sigma²)
        x0 = argmin_z  ‖ỹ − A(z)‖²/(2·s²) + ‖z − c‖²/(2·r²)
        x' = alpha'·x0 + sigma'·n,           n, n_x, n_y ~ N(0, I)

    For linear A the minimum is a draw from N(z; D, r²·I)·N(y; A·z, s²·I), exactly (perturb and
    optimise), where the paper walks a Langevin chain. Different seeds are samples of the
    posterior: their spread is the uncertainty of the restoration. One evaluation per step, the
    network is never differentiated; more steps make the bias smaller.

    operator, y, space, data_range: as for `reddiff`; noise, v, cg, gn: as for the rule `data`.

    Levels with alpha < 0.05 take x0 = c: D is the mean of all data there. The covariance of x0
    given x is taken as r²·I, as in the paper.
    """

    operator: Any
    y: Any
    noise: Positive
    v: Positive = 1.0
    cg: Count = 4
    gn: Count = 1
    space: Literal["model", "image"] = "model"
    data_range: Range | None = None

    draws: ClassVar[tuple[str, ...]] = ("y", "x")
    reference: ClassVar[str] = (
        "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (Zhang et al., "
        "2024), arXiv:2407.01521, Algorithm 1"
    )

    def __post_init__(self) -> None:
        made = measurement(self.operator, self.y, data_range=self.data_range, name=self.name)
        object.__setattr__(self, "_measured", made)

    @property
    def convergence(self) -> None:
        return None

    @property
    def stochastic(self) -> bool:
        return True

    def bind(self, context: SamplerContext) -> DAPS:
        """The same with A ∘ decode as its operator, where y belongs to the decoded image."""
        if self.space == "model":
            return self
        bound = replace(self)
        through = self._measurement.through(context.adapter.unclamped(), context.size)
        object.__setattr__(bound, "_measured", through)
        return bound

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        if self.space == "image" and not self._measurement.decoded:
            raise ValueError("daps: space = 'image' needs generate(), whose pipeline decodes.")
        return grid

    def start(self, x: Any, level: Level) -> tuple[Any, Any]:
        """x, and y [B, ...]: a step may be of some rows only, those that share their levels."""
        y = self._measurement.rows(x)
        return x, y.expand(len(x), *y.shape[1:])

    def step(self, x: Any, pred: Prediction, span: Span, state: Any) -> Move:
        from sampler.samplers.proximal import nearest

        measured, level = self._measurement, span.now
        d = pred.x0.tensor()
        r2 = posterior_variance(self.v, level.alpha, level.sigma)
        x0 = d + r2**0.5 * span.noise("x", d)
        if level.alpha >= MIN_ALPHA:
            y = state + self.noise * measured.gain * span.noise("y", state)
            x0 = nearest(measured, y, x0, self.noise, r2, self.cg, self.gn)
        return Move(span.next.alpha * x0, span.next.sigma, state)

    @property
    def _measurement(self) -> Measurement:
        return vars(self)["_measured"]
