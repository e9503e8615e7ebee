"""RED-Diff: inverse problems by stochastic optimisation under a diffusion prior.

    x0 = mu + sigma_x0·n0;   x_t = alpha·x0 + sigma·n,   n, n0 ~ N(0, I)
    L = obs_weight·‖y − A(x0)‖²/(2m) + w·<stop(eps(x_t) − n), x0>/D
    mu <- Adam(mu, dL/dmu),   w = lam·g(sigma/alpha)

m and D are the numbers of elements of y and of x in a row. (sigma/alpha)·(eps − n) is x0 − x0_hat,
so the second gradient is w·(alpha/sigma)·(x0 − x0_hat): a denoising residual, in image units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

from annotated_types import Ge, Lt

from sampler.core.binding import SamplerContext
from sampler.registry import register
from sampler.registry.constraints import Nonnegative, Positive
from sampler.samplers.measurement import Measurement, Range, measurement
from sampler.samplers.weights import WEIGHTS, Weight
from sampler.types import Level, Lin, Move, Prediction, SamplerBase, Span

# torch.optim.Adam with the published betas; the published eps is 1e-8.
_BETAS = (0.9, 0.99)


class REDDiffState(NamedTuple):
    """mu [B, ...], Adam's moments, updates made, the last x0; the sum of averaged mu, how many."""

    mu: Any
    first: Any
    second: Any
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    x0: Any
    total: Any
    averaged: int


@register("sampler", "reddiff")
@dataclass(frozen=True, eq=False)
class REDDiff(SamplerBase):
    """RED-Diff: a variational point estimate of x0 given y = A(x0) + noise; one pass over the grid.

    Every step is one Adam update of mu from one re-noised query; exactly one per requested step.
    The network is never differentiated: a step costs one evaluation, and the operator's gradient.
    The result is mu, a mode of the posterior, so that seeds differ little.

    operator: an object with A(x) and, unless `init` is given, A_dagger(y): those of
        `operators.py` by name or {"name": ...}, deepinv's physics, a matrix [m, D], or a function.
    y: the measurement, a tensor [B or 1, ...] or an image file (range [-1, 1]).
    lam: >= 0, weight of the prior, 0.25 as published. lr: > 0, Adam's, constant, 0.1 as published;
        0.25 to 0.5 in the published examples.
    weight: g of w = lam·g(sigma/alpha): "linear" (default) q, "sqrt" q^(1/2), "square" q²,
        "log" ln(1 + q), "trunc_linear" min(q, 1), "power2over3" q^(2/3), "const" 1.
    init: mu to start from [B or 1, ...]; the pseudo-inverse of y without.
    data_range: where the operator expects images; None is [0, 1] for deepinv, else [-1, 1].
    reduction: "published" takes means over y and over x, so that their sizes weigh the terms;
        "sum" takes sums: lam is then in units of the measurement noise's variance.
    obs_weight: >= 0, of the data term; 0 leaves the prior alone (score distillation).
    sigma_x0: >= 0, noise on mu in every query; 0 as published.
    decay: "linear" or "cosine" takes lr to 0 over the run (ours; "none" as published). average:
        the share of last steps whose mu is averaged (ours; 0 as published). Adam moves each
        coordinate by about lr to the end, which both of them reduce.
    eps: Adam's, for a loss of one row; the published code's loss is a mean over B rows as well,
        which is eps·B here.
    returns: "mu" (default), or "published": x0 before the last update, as the published loop.
    space: "model" where y belongs to x itself; "image" decodes latents first (experimental: needs
        `generate`, takes the gradient through the decoder).

    Deviations: exactly as many steps as asked for (the published loop makes 13 of 12), and a loss
    per row, so that rows do not depend on their batch.
    """

    operator: Any
    y: Any
    lam: Nonnegative = 0.25
    lr: Positive = 0.1
    weight: Weight = "linear"
    init: Any = None
    data_range: Range | None = None
    reduction: Literal["published", "sum"] = "published"
    obs_weight: Nonnegative = 1.0
    sigma_x0: Nonnegative = 0.0
    decay: Literal["none", "linear", "cosine"] = "none"
    average: Annotated[float, Ge(0), Lt(1)] = 0.0
    eps: Nonnegative = 1e-8
    returns: Literal["mu", "published"] = "mu"
    space: Literal["model", "image"] = "model"

    reference: ClassVar[str] = (
        "A Variational Perspective on Solving Inverse Problems with Diffusion Models "
        "(Mardani et al., 2024), arXiv:2305.04391, Algorithm 1"
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
        return True

    def bind(self, context: SamplerContext) -> REDDiff:
        """The same with A ∘ decode as its operator, where y belongs to the decoded image."""
        if self.space == "model":
            return self
        bound = replace(self)
        through = self._measurement.through(context.adapter, context.size)
        object.__setattr__(bound, "_measured", through)
        return bound

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        if self.weight == "square" and grid[0].alpha == 0:
            raise ValueError(
                "reddiff: weight = 'square' is infinite at this grid's first level, which has no "
                "signal (alpha = 0); choose another weight."
            )
        return grid

    def start(self, x: Any, level: Level) -> tuple[Any, Any]:
        if self.space == "image" and not self._measurement.decoded:
            raise ValueError("reddiff: space = 'image' needs generate(), whose pipeline decodes.")
        mu = self._measurement.start(x)
        unit = x / math.sqrt(level.alpha**2 + level.sigma**2)  # the first noise, unscaled
        query = level.alpha * self._query(mu, 0) + level.sigma * unit
        zero = mu.new_zeros(mu.shape)
        x0 = mu if self.returns == "published" else None
        return query, REDDiffState(mu, zero, zero, 0, x0, zero if self.average else None, 0)

    def step(self, x: Any, pred: Prediction, span: Span, state: REDDiffState) -> Move:
        import torch

        measured = self._measurement
        x0 = self._query(state.mu, span.index)
        q = span.now.sigma / span.now.alpha if span.now.alpha else math.inf
        with torch.no_grad():
            prior = self.lam * WEIGHTS[self.weight](q) * (Lin.of(x0) - pred.x0)
            # The loss is taken times D, so that gradients are of the size of residuals.
            size = math.prod(x0.shape[1:])
            scale = self.obs_weight * (size / measured.size if self.reduction == "published" else 1)
            slope = prior + scale * Lin.of(measured.gradient(x0)) if scale else prior
            slope = slope.tensor()
            state = self._adam(state, slope, span, size if self.reduction == "published" else 1)
            if self.average and self._averages(span):
                total = state.total + state.mu
                state = state._replace(total=total, averaged=state.averaged + 1)
            if self.returns == "published":
                state = state._replace(x0=x0)
        mean = span.next.alpha * self._query(state.mu, span.index + 1)
        return Move(mean, span.next.sigma, state)

    def finish(self, x: Any, state: REDDiffState) -> Any:
        if self.returns == "published":
            return state.x0
        return state.total / state.averaged if state.averaged else state.mu

    def _adam(self, state: REDDiffState, slope: Any, span: Span, size: int) -> REDDiffState:
        """One update; eps is multiplied with `size`, as the gradient is."""
        b1, b2 = _BETAS
        count = state.count + 1
        first = b1 * state.first + (1 - b1) * slope
        second = b2 * state.second + (1 - b2) * slope * slope
        spread = (second / (1 - b2**count)).sqrt() + self.eps * size
        lr = self.lr * self._decayed(span)
        mu = state.mu - lr * (first / (1 - b1**count)) / spread
        return state._replace(mu=mu, first=first, second=second, count=count)

    def _decayed(self, span: Span) -> float:
        if self.decay == "none" or not span.total:
            return 1.0
        left = 1 - span.index / span.total
        return left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2

    def _averages(self, span: Span) -> bool:
        first = math.ceil((1 - self.average) * span.total - 1e-9)
        return span.index >= min(first, span.total - 1)

    def _query(self, mu: Any, index: int) -> Any:
        """x0 of the query at step `index`: mu, or mu with noise that all rows share."""
        if not self.sigma_x0:
            return mu
        return mu + self.sigma_x0 * _shared_noise(index, mu)

    @property
    def _measurement(self) -> Measurement:
        return cast(Any, self)._measured


def _shared_noise(index: int, like: Any) -> Any:
    from sampler.core.noise import Noise

    return Noise((0,)).draw(index, like[:1], "reddiff")
