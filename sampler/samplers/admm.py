"""Plug-and-play ADMM: an inverse problem with a denoiser as the proximal operator of its prior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.registry.constraints import Count, Positive
from sampler.samplers.measurement import (
    Measurement,
    Range,
    measurement,
    posterior_variance,
)
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span


class ADMMState(NamedTuple):
    """x fits the data y, z the prior; x − z: the primal residual; u: the scaled dual [B, ...]."""

    x: Any
    u: Any
    z: Any
    y: Any


@register("sampler", "admm")
@dataclass(frozen=True, eq=False)
class ADMM(SamplerBase):
    """Plug-and-play ADMM: data and prior in turn, tied by a dual variable; a fixed point.

        x ← argmin ‖y − A x‖²/(2·s²) + (rho/2)·‖x − z + u‖²;   u ← u + x − z;   z ← D(x + u)

    D is the network's estimate of x0 at the input alpha·(x + u), so each step is one evaluation
    and the network is never differentiated. Where D is the proximal operator of R/rho, of a learned
    proximal network for instance (`sampler.models.proximal`), the fixed point minimises
    ‖y − A x‖²/(2·s²) + R(x); a denoiser at noise sigma/alpha is taken for that of −log p with
    rho = alpha²/sigma². The result is x, after the last evaluation.

    operator, y, init, data_range, space: as for `reddiff`; the start z is init, or the
        pseudo-inverse of y.
    noise: s above 0, of y in units of [-1, 1]; only rho·s² decides. rho: above 0, held over the
        run; None takes alpha²/sigma² + 1 at each level, with which u is rescaled. The published
        deblurring has s = 1 and rho = 0.1 with 20 steps, the tomography 0.05 with 80.
    renoise: whether D is evaluated at alpha·(x + u) + sigma·n, n ~ N(0, I), which is what a
        diffusion network was trained on (DiffPIR); False (default) for proximal networks.
    cg: iterations of the linear system, 30 as published; gn: Gauss–Newton steps, for operators
        that are not linear.

    A grid of a proximal network has alpha = 1 and one sigma throughout, and a last level without
    noise. The order of the three updates is that of the published code.
    """

    operator: Any
    y: Any
    noise: Positive
    rho: Positive | None = None
    renoise: bool = False
    init: Any = None
    cg: Count = 30
    gn: Count = 1
    space: Literal["model", "image"] = "model"
    data_range: Range | None = None

    reference: ClassVar[str] = (
        "What's in a Prior? Learned Proximal Networks for Inverse Problems (Fang et al., 2024), "
        "arXiv:2310.14344, Algorithm 3, and its published code; renoise: Denoising Diffusion "
        "Models for Plug-and-Play Image Restoration (Zhu et al., 2023), arXiv:2305.08995"
    )

    def __post_init__(self) -> None:
        made = measurement(
            self.operator, self.y, self.init, self.data_range, self.name, needs_start=True
        )
        object.__setattr__(self, "_measured", made)

    @property
    def convergence(self) -> None:
        return None

    @property
    def stochastic(self) -> bool:
        return self.renoise

    def bind(self, context: SamplerContext) -> ADMM:
        """The same with A ∘ decode as its operator, where y belongs to the decoded image."""
        if self.space == "model":
            return self
        bound = replace(self)
        through = self._measurement.through(context.adapter.unclamped(), context.size)
        object.__setattr__(bound, "_measured", through)
        return bound

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        if self.space == "image" and not self._measurement.decoded:
            raise ValueError("admm: space = 'image' needs generate(), whose pipeline decodes.")
        return grid

    def start(self, x: Any, level: Level) -> tuple[Any, ADMMState]:
        z, y = self._measurement.start(x), self._measurement.rows(x)
        state = self._split(z, 0 * z, y.expand(len(z), *y.shape[1:]), self._variance(level))
        query = level.alpha * Lin.of(state.x + state.u)
        if self.renoise:  # the first noise, of unit variance
            norm = (level.alpha**2 + level.sigma**2) ** 0.5
            query = query + (level.sigma / norm) * Lin.of(x)
        return query, state

    def step(self, x: Any, pred: Prediction, span: Span, state: ADMMState) -> Move:
        before, after = self._variance(span.now), self._variance(span.next)
        state = self._split(pred.x0.tensor(), (after / before) * state.u, state.y, after)
        if span.next.sigma == 0:
            return Move(state.x, 0.0, state)
        std = span.next.sigma if self.renoise else 0.0
        return Move(span.next.alpha * (state.x + state.u), std, state)

    def _split(self, z: Any, u: Any, y: Any, variance: Any) -> ADMMState:
        """The updates of x and of u, for a new z."""
        from sampler.samplers.proximal import nearest

        x = nearest(self._measurement, y, z - u, self.noise, variance, self.cg, self.gn)
        return ADMMState(x, u + x - z, z, y)

    def _variance(self, level: Level) -> Any:
        """1/rho at a level, a number or [B]."""
        if self.rho is not None:
            return 1 / self.rho
        return posterior_variance(1.0, level.alpha, level.sigma)

    @property
    def _measurement(self) -> Measurement:
        return vars(self)["_measured"]
