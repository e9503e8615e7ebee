"""The evaluated predictions of a run, newest first, and what is extrapolated from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

from sampler.guidance.spaces import choose, in_space
from sampler.types import Level, Lin, Prediction

Weights = Callable[[Any], Any]  # clocks [B, K] to weights [B, K], numpy float64


class ForecastHistory(NamedTuple):
    """values: q_j [B, ...] in the space of the forecast, newest first.

    directions: those of the rule's output, where it keeps a direction apart from the target.
    clocks: τ_j, numbers where all samples share them, else float64 [B, K] on the CPU, NaN where a
    sample has fewer nodes than others. kind: the parametrisation of the rule's last output.
    """

    values: tuple[Any, ...] = ()
    directions: tuple[Any, ...] = ()
    clocks: Any = ()
    kind: str = ""

    @property
    def times(self) -> Any:
        """Clocks [1 or B, K], numpy float64."""
        import numpy as np

        shared = isinstance(self.clocks, tuple)
        return np.array([self.clocks], dtype=np.float64) if shared else self.clocks.numpy()

    def kept(
        self, pred: Prediction, clock: float, space: str, due: Any, fresh: Any, size: int | None
    ) -> ForecastHistory:
        """The history with an output of the inner rule as its newest node.

        due: True, or bool [B]: the samples that were evaluated. fresh: False, True or bool [B]: the
        evaluated samples whose older nodes are dropped. size: nodes to keep, None for all. Without
        signal (alpha = 0) a prediction does not determine the next ones, and is not a node.
        """
        after = self._replace(kind=pred.kind)
        if fresh is True:
            after = after._replace(values=(), directions=(), clocks=())
        if not pred.level.alpha:
            return after
        # A direction replaces eps alone: the target is read without it.
        value = in_space(replace(pred, direction=None), space)
        values = _pushed(after.values, value, due, size)
        directions = after.directions
        if pred.direction is not None:
            directions = _pushed(after.directions, pred.direction, due, size)
        shape = (pred.x.shape[0], len(values))
        clocks = _clocks(after.clocks, clock, due, fresh, shape)
        return ForecastHistory(values, directions, clocks, pred.kind)

    def forecast(self, x: Any, level: Level, space: str, weights: Weights) -> Prediction:
        """The extrapolated output at a level, in the parametrisation of the rule's last one."""
        found = self._scalars(weights(self.times))
        kind = self.kind if space == "native" else space
        pred = Prediction.of(kind, x, _weighted(found, self.values), level)
        if kind != self.kind:
            pred = Prediction.of(self.kind, x, in_space(pred, self.kind), level)
        if self.directions:
            pred = replace(pred, direction=_weighted(found, self.directions))
        return pred

    def miss(self, pred: Prediction, clock: float, space: str) -> tuple[Any, Any]:
        """(rms of what a line through the newest two nodes misses, [B]; d·(d + D), numpy).

        d: distance of the clocks from the newest node to this step; D: between the two nodes.
        """
        times = self.times
        d, between = clock - times[:, 0], times[:, 0] - times[:, 1]
        scale = self._scalars((d / between)[:, None], missing=0.0)[0]
        newest, older = (Lin.of(value) for value in self.values[:2])
        value = in_space(replace(pred, direction=None), space)
        from sampler_kernels import gram

        square = gram(newest + scale * (newest - older) - value)[0, 0]
        return (square / math.prod(value.shape[1:])).sqrt(), d * (d + between)

    def _scalars(self, weights: Any, missing: float | None = None) -> list[Any]:
        """Columns of weights [1 or B, K] as numbers, or as tensors [B] beside the values."""
        import numpy as np
        import torch

        if missing is not None:
            weights = np.where(np.isfinite(weights), weights, missing)
        if isinstance(self.clocks, tuple):
            return weights[0].tolist()
        like = Lin.of(self.values[0]).like
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        return list(torch.tensor(weights.T, dtype=dtype, device=like.device))


def choose_due(due: Any, yes: Prediction, no: Prediction) -> Prediction:
    """`yes` in the samples [B] that are due, else `no`; both of one parametrisation."""
    pred = yes.like(choose(due, yes.out, no.out))
    if yes.direction is not None and no.direction is not None:
        pred = replace(pred, direction=choose(due, yes.direction, no.direction))
    return pred


def _pushed(values: tuple[Any, ...], value: Lin, due: Any, size: int | None) -> tuple[Any, ...]:
    after = (value, *values)[:size]
    if due is True:
        return after
    old = (*values, values[-1])  # a sample that is not due has no node in the last place
    return tuple(choose(due, Lin.of(a), Lin.of(b)) for a, b in zip(after, old, strict=False))


def _clocks(clocks: Any, clock: float, due: Any, fresh: Any, shape: tuple[int, int]) -> Any:
    rows, size = shape
    if isinstance(clocks, tuple) and due is True and isinstance(fresh, bool):
        return (clock, *cast("tuple[float, ...]", clocks))[:size]
    import torch

    if isinstance(clocks, tuple):
        clocks = torch.tensor([clocks], dtype=torch.float64).expand(rows, -1)
    first = torch.full((rows, 1), clock, dtype=torch.float64)
    after = torch.cat([first, clocks], 1)[:, :size]
    if not isinstance(fresh, bool):
        after[fresh, 1:] = math.nan
    if due is True:
        return after
    rest = torch.full((rows, 1), math.nan, dtype=torch.float64)
    return torch.where(due[:, None], after, torch.cat([clocks, rest], 1)[:, :size])


def _weighted(weights: list[Any], values: tuple[Any, ...]) -> Lin:
    total = weights[0] * Lin.of(values[0])
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * Lin.of(value)
    return total
