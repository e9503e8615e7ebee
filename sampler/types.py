"""Values that the loop passes on, and the base classes of strategies.

Notation, everywhere in this project:

    x_t = alpha · x0 + sigma · eps        x, x0, eps: [B, ...], one row per sample
    v        = alpha · eps − sigma · x0   (variance preserving: alpha² + sigma² = 1)
    velocity = eps − x0                   (flow matching: alpha = 1 − sigma)

A level is (alpha, sigma) and the time input of the network, `t`. Betas, log-SNR and flow times
exist in `schedule.py` only. Nothing here imports torch, so that `sampler list` starts at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from sampler_kernels import Lin, gram, settle, sqrt

if TYPE_CHECKING:
    from torch import Tensor

    Values = Tensor | Lin
    Scalar = float | Tensor

MAX_SEED = 2**63 - 1  # the largest seed of a sample


class Level(NamedTuple):
    """One noise level: `t` is the network's time input, x = alpha·x0 + sigma·eps.

    Floats computed in float64; or tensors [B], where samples are at different levels (training).
    """

    t: Any
    alpha: Any
    sigma: Any


class Span(NamedTuple):
    """One step: number `index` of the run, from level `now` to level `next`.

    `total`: the number of steps of the run, 0 where it is not known. `noise(stream, like)`: normal
    noise of the samples at this step, for samplers with `draws`; None for the others.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    now: Level
    next: Level
    total: int = 0
    noise: Any = None


@dataclass(frozen=True)
class Prediction:
    """One network output, or a guided one, convertible between parametrisations exactly and lazily.

    `out` is the value in the network's own parametrisation `kind`: "eps", "v", "x0" or
    "velocity". `direction`, where a rule sets it, replaces `eps` alone: samplers take the target
    from `.x0` and the direction from `.eps` (CFG++ keeps the two apart). `seen`: answer to the
    `Watch` of a branch, maps {layer: [R, N, T]} of N image tokens on T text tokens, in the rows
    that were evaluated.

    x0 = (x − sigma·eps) / alpha;   x0 = alpha·x − sigma·v;   x0 = x − sigma·velocity (flow).
    """

    x: Lin
    out: Lin
    kind: str
    level: Level
    direction: Lin | None = None
    seen: Any = None

    def __init__(
        self,
        x: Lin,
        out: Lin,
        kind: str,
        level: Level,
        direction: Lin | None = None,
        seen: Any = None,
    ) -> None:
        # A frozen dataclass sets its fields one by one, which takes as long as a tensor operation.
        self.__dict__.update(x=x, out=out, kind=kind, level=level, direction=direction, seen=seen)

    @staticmethod
    def of(kind: str, x: Values, out: Values, level: Level) -> Prediction:
        """From a network output `out` [B, ...] of the given kind at `x` [B, ...].

        Raises ValueError for an unknown kind, and for an eps-prediction at alpha = 0, where x0
        would be a division by 0.
        """
        if kind not in KINDS:
            raise ValueError(f"Unknown prediction type {kind!r}; one of {', '.join(KINDS)}.")
        if kind == "eps" and isinstance(level.alpha, float) and level.alpha == 0.0:
            raise ValueError(
                f"An eps-prediction says nothing about x0 at alpha = 0 (t = {level.t}); "
                "use a grid that starts at a level with signal, or a v-prediction model."
            )
        return Prediction(Lin.of(x), Lin.of(out), kind, level)

    @staticmethod
    def from_x0(x: Values, out: Values, level: Level, eps: Values | None = None) -> Prediction:
        """From an estimate of x0; `eps` sets the direction apart from it."""
        direction = None if eps is None else Lin.of(eps)
        return replace(Prediction.of("x0", x, out, level), direction=direction)

    @staticmethod
    def from_eps(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of the noise; ValueError at alpha = 0."""
        return Prediction.of("eps", x, out, level)

    @staticmethod
    def from_v(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of v = alpha·eps − sigma·x0."""
        return Prediction.of("v", x, out, level)

    @staticmethod
    def from_velocity(x: Values, out: Values, level: Level) -> Prediction:
        """From an estimate of velocity = eps − x0."""
        return Prediction.of("velocity", x, out, level)

    def like(self, out: Values) -> Prediction:
        """The prediction at the same x, level and parametrisation with another output.

        For rules whose weights sum to one: they may combine `.out` directly, since every
        parametrisation is affine in every other at fixed (x, level).
        """
        return Prediction(self.x, Lin.of(out), self.kind, self.level)

    @property
    def x0(self) -> Lin:
        """The estimate of the clean sample."""
        a, s = self.level.alpha, self.level.sigma
        if self.kind == "x0":
            return self.out
        if self.kind == "eps":
            return (self.x - s * self.out) / a
        if self.kind == "v":
            return _over(a * self.x - s * self.out, a * a + s * s)
        return _over(self.x - s * self.out, a + s)

    @property
    def eps(self) -> Lin:
        """The estimate of the noise; ValueError at sigma = 0 for an x0-prediction."""
        a, s = self.level.alpha, self.level.sigma
        if self.direction is not None:
            return self.direction
        if self.kind == "eps":
            return self.out
        if self.kind == "x0":
            if isinstance(s, float) and s == 0.0:
                raise ValueError("At sigma = 0 an x0-prediction has no eps: x holds no noise.")
            if isinstance(s, float):
                return (self.x - a * self.out) / s
            # Samples that are finished have no noise left: 0, where the formula divides 0 by 0.
            return (self.x - a * self.out) * ((s != 0) / s.where(s != 0, s + 1))
        if self.kind == "v":
            return _over(a * self.out + s * self.x, a * a + s * s)
        return _over(self.x + a * self.out, a + s)

    @property
    def v(self) -> Lin:
        """alpha·eps − sigma·x0."""
        if self.kind == "v" and self.direction is None:
            return self.out
        return self.level.alpha * self.eps - self.level.sigma * self.x0

    @property
    def velocity(self) -> Lin:
        """eps − x0."""
        if self.kind == "velocity" and self.direction is None:
            return self.out
        return self.eps - self.x0


KINDS = ("eps", "v", "x0", "velocity")


@dataclass(frozen=True)
class Move:
    """A step: x' = mean + std·noise. The loop draws the noise.

    `mean` [B, ...]; `std` a float or [B]; `state` is passed to the sampler at the next step.
    `over`: the interval (lambda, lambda') of the samples' Brownian paths that the noise is, or a
    list with one per sample; None for noise of this step alone (`sampler.core.brownian`).
    """

    mean: Any
    std: Any = 0.0
    state: Any = ()
    over: Any = None

    def log_prob(self, x_next: Values) -> Tensor:
        """log N(x_next; mean, std²·I) per row [B], summed over the row's D elements.

            −‖x' − mean‖² / (2 std²) − (D/2)·log(2π std²)

        Raises ValueError where std is 0: a deterministic move has no density.
        """
        zero = self.std == 0.0 if isinstance(self.std, float) else bool((self.std == 0).any())
        if zero:
            raise ValueError("A move with std = 0 has no density; use a stochastic sampler.")
        mean = Lin.of(self.mean)
        square = gram((Lin.of(x_next) - mean) / self.std)[0, 0]
        count = math.prod(mean.shape[1:])
        log_std = math.log(self.std) if isinstance(self.std, float) else self.std.log()
        return settle(-0.5 * square - count * (0.5 * math.log(2 * math.pi) + log_std))


@dataclass(frozen=True)
class Cond:
    """The conditions of B rows: a tree of tensors [B, ...] (or anything `fn` takes) per branch.

    `extra`: further conditions by name, for rules with branches of their own.
    """

    cond: Any = None
    uncond: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Branch:
    """One evaluation requested by a rule: this condition, on this model, for these rows.

    `rows`: bool tensor [B] on the CPU, or None for all. Rows that "cond" leaves out come back as
    0, and the rule fills them. Rows that another branch leaves out get the prediction of "cond",
    so that cond − uncond is 0 there. A branch whose mask is empty is the same as no branch.
    `negative`: condition tree of a negative prompt inside the attention, None for none; `mixing`
    is then a function of the attention outputs (positive, negative) [R, tokens, channels].
    `watch`: a request to record the attention of this branch, answered in `Prediction.seen`.
    """

    cond: Any = None
    model: str = "main"
    rows: Any = None
    negative: Any = None
    mixing: Any = None
    watch: Watch | None = None


@dataclass(frozen=True)
class Watch:
    """Request to record the attention of a branch to its text, for one evaluation.

    score: None for the probabilities themselves; else a function of {branch: Prediction} of the
    same evaluation to a score [B] whose derivative weighs them (Grad-SAM), one backward pass.
    """

    score: Any = None


class Snapshot(NamedTuple):
    """Everything that a run needs to continue after step `index − 1`; saved with `save_snapshot`.

    x [B, ...]; `sampler` and `guidance` are the strategies' states; `seeds` one int per row;
    `nfe` the denoiser rows evaluated so far, per row of the batch.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    x: Any
    sampler: Any
    guidance: Any
    seeds: tuple[int, ...]
    nfe: tuple[int, ...]


class Denoiser(Protocol):
    """A model that predicts x0 for several branches in one batched evaluation.

    x [B, ...]; the answer has a Prediction for every branch. Adds to `nfe`, a list of B ints,
    each row that is evaluated.
    """

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> Mapping[str, Prediction]: ...


class SamplerBase:
    """Base of the samplers: a method that moves one level down, given one prediction.

    It never calls the model. A strategy is a frozen dataclass that overrides what differs.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    # Whether a prediction's direction enters as x' = alpha'·x0 + sigma'·direction at the first
    # step; rules that keep one apart from the target refuse other samplers.
    follows_direction: ClassVar[bool] = False
    # Streams of `sampler.core.noise` that a step draws from, besides the noise of its move.
    draws: ClassVar[tuple[str, ...]] = ()

    @property
    def convergence(self) -> float | None:
        """Order of convergence to the exact ODE on equal steps in u (tested); None without one."""
        return 1.0

    @property
    def evaluations(self) -> int:
        """Evaluations per step, each of which is a step of the grid that `levels` returns."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Return whether moves may have std > 0."""
        return False

    def bind(self, context: Any) -> Any:
        """The sampler completed for a run of `generate` (a calibrated number, a decoder).

        context: `sampler.core.binding.SamplerContext`. Raises ValueError for a run that the sampler
        cannot do, before the network is called.
        """
        return self

    def with_schedule(self, schedule: Any) -> Any:
        """The sampler with the times of levels between those of the grid, from a `Schedule`."""
        return self

    def levels(self, grid: tuple[Level, ...]) -> tuple[Level, ...]:
        """The grid to walk, from the requested grid; noisy first."""
        return grid

    def start(self, x: Tensor, level: Level) -> tuple[Any, Any]:
        """(x, first state) from the first noise x [B, ...]."""
        return x, ()

    def finish(self, x: Tensor, state: Any) -> Any:
        """The result [B, ...] from the last x and state."""
        return x

    def step_with_error(
        self, x: Tensor, pred: Prediction, span: Span, state: Any
    ) -> tuple[Move, Lin | None]:
        """(move of `step`, mean of the next higher order − its mean [B, ...]), for `solver_error`.

        The second is None where no estimate can be formed. The state may hold one prediction more
        than that of `step`.
        """
        return self.step(x, pred, span, state), None

    def step(self, x: Tensor, pred: Prediction, span: Span, state: Any) -> Move:
        """The move from `span.now` to `span.next`."""
        raise NotImplementedError


class GuidanceBase:
    """Base of the rules: names the branches to evaluate, and combines them into one prediction.

    A strategy is a frozen dataclass that overrides what differs.
    """

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[str]:
        """Names that must be there: "cond", "uncond", and those of further models ("weak")."""
        return frozenset({"cond"})

    @property
    def sets_direction(self) -> bool:
        """Return True if predictions have a direction apart from their target."""
        return False

    @property
    def graph_refusal(self) -> str:
        """Reason that runs cannot be CUDA graphs; "" where they can."""
        return ""

    def check(self, adapter: Any) -> None:
        """Raise ValueError for a `PipelineAdapter` that the rule cannot run on."""

    def bind(self, context: Any, cond: Cond) -> tuple[Any, Cond]:
        """(rule, conditions) completed for a run of `generate`: a classifier, further conditions.

        context: `sampler.core.binding.GuidanceContext`. Raises ValueError for a run that the rule
        cannot do, before the network is called. A rule with rules inside binds them too.
        """
        return self, cond

    def start(self, cond: Cond) -> Any:
        """The first state of a run over these conditions."""
        return ()

    def plan(self, x: Tensor, span: Span, cond: Cond, state: Any) -> Mapping[str, Branch]:
        """The evaluations of this step, in the order in which they are stacked."""
        return {"cond": Branch(cond.cond)}

    def combine(
        self, x: Tensor, preds: Mapping[str, Prediction], span: Span, state: Any
    ) -> tuple[Prediction, Any]:
        """(guided prediction, next state)."""
        return preds["cond"], state


# Names for annotations.
Sampler = SamplerBase
Guidance = GuidanceBase


def spans(levels: tuple[Level, ...] | list[Level]) -> list[Span]:
    """The steps of a grid of N + 1 levels."""
    return [
        Span(i, now, after, len(levels) - 1)
        for i, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True))
    ]


def _over(lin: Lin, norm: Scalar) -> Lin:
    """lin / norm, where norm is 1 up to rounding for the levels that the kind belongs to."""
    if isinstance(norm, float) and abs(norm - 1) < 1e-6:
        return lin
    return lin / norm


__all__ = [
    "KINDS",
    "MAX_SEED",
    "Branch",
    "Cond",
    "Denoiser",
    "Guidance",
    "GuidanceBase",
    "Level",
    "Lin",
    "Move",
    "Prediction",
    "Sampler",
    "SamplerBase",
    "Snapshot",
    "Span",
    "gram",
    "settle",
    "spans",
    "sqrt",
]
