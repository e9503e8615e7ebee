"""Levels, steps of a grid, moves, conditions, branches and snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sampler_kernels import Lin, gram, settle

if TYPE_CHECKING:
    from torch import Tensor

    Values = Tensor | Lin

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

    def __init__(self, mean: Any, std: Any = 0.0, state: Any = (), over: Any = None) -> None:
        # A frozen dataclass sets its fields one by one, which takes as long as a tensor operation.
        self.__dict__.update(mean=mean, std=std, state=state, over=over)

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

    def __init__(
        self,
        cond: Any = None,
        model: str = "main",
        rows: Any = None,
        negative: Any = None,
        mixing: Any = None,
        watch: Watch | None = None,
    ) -> None:
        # At once, as in `Move`.
        self.__dict__.update(
            cond=cond, model=model, rows=rows, negative=negative, mixing=mixing, watch=watch
        )


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


def spans(levels: tuple[Level, ...] | list[Level]) -> list[Span]:
    """The steps of a grid of N + 1 levels."""
    return [
        Span(i, now, after, len(levels) - 1)
        for i, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True))
    ]
