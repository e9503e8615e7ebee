"""Estimate of a run's discretisation error, from the evaluations that the run makes anyway.

    solver_error = sum over steps of ‖x'_{p+1} − x'_p‖/sqrt(D),   D = number of elements of x

x'_p is the mean of the step as taken, x'_{p+1} that of the next higher order
(`SamplerBase.step_with_error`). Per row: a row's value does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sampler_kernels import gram, sqrt

from sampler.core.trajectory import Run
from sampler.types import Move, Prediction, Sampler, SamplerBase, Snapshot, Span


class Summed(NamedTuple):
    """State of a sampler, and the sum [B] so far; None before the first estimate."""

    state: Any
    error: Any


@dataclass(frozen=True)
class ErrorSum:
    """A sampler that takes the same steps as `method` and sums their errors in its state."""

    method: Any

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def stochastic(self) -> bool:
        return self.method.stochastic

    def step(self, x: Any, pred: Prediction, span: Span, state: Summed) -> Move:
        move, gap = self.method.step_with_error(x, pred, span, state.state)
        total = state.error
        if gap is not None:
            rms = sqrt(gram(gap)[0, 0] / math.prod(gap.shape[1:]))
            total = rms if total is None else total + rms
        return replace(move, state=Summed(move.state, total))

    def finish(self, x: Any, state: Summed) -> Any:
        return self.method.finish(x, state.state)


def with_error(run: Run) -> Run:
    """Return the run with its errors summed; the run itself where its sampler has no estimate."""
    if not has_estimate(run.method):
        return run
    method: Any = ErrorSum(run.method)
    snapshot = run.snapshot._replace(sampler=Summed(run.snapshot.sampler, None))
    return run._replace(snapshot=snapshot, method=method)


def error_of(last: Snapshot) -> tuple[float, ...] | None:
    """The sums of a run's last snapshot, one per row; None where nothing was estimated."""
    if not isinstance(last.sampler, Summed) or last.sampler.error is None:
        return None
    return tuple(last.sampler.error.tolist())


def has_estimate(method: Sampler) -> bool:
    """Return True for samplers with a `step_with_error` of their own."""
    own = getattr(type(method), "step_with_error", None)
    return own not in (None, SamplerBase.step_with_error)
