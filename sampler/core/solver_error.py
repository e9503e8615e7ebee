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
    """State of a sampler; the sum [B] up to the last step, and the difference [B, ...] of that one.

    Either is None before the first estimate. The difference is settled with its step, which has
    computed most of it anyway, and its norm is taken at the next one.
    """

    state: Any
    error: Any = None
    gap: Any = None

    def total(self) -> Any:
        """The sum [B] with the last step; None without an estimate."""
        if self.gap is None:
            return self.error
        rms = sqrt(gram(self.gap)[0, 0] / math.prod(self.gap.shape[1:]))
        return rms if self.error is None else self.error + rms


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
        return replace(move, state=Summed(move.state, state.total(), gap))

    def finish(self, x: Any, state: Summed) -> Any:
        return self.method.finish(x, state.state)


def with_error(run: Run) -> Run:
    """Return the run with its errors summed; the run itself where its sampler has no estimate."""
    if not has_estimate(run.method):
        return run
    method: Any = ErrorSum(run.method)
    snapshot = run.snapshot._replace(sampler=Summed(run.snapshot.sampler))
    return run._replace(snapshot=snapshot, method=method)


def error_of(last: Snapshot) -> tuple[float, ...] | None:
    """The sums of a run's last snapshot, one per row; None where nothing was estimated."""
    total = last.sampler.total() if isinstance(last.sampler, Summed) else None
    return None if total is None else tuple(total.tolist())


def has_estimate(method: Sampler) -> bool:
    """Return True for samplers with a `step_with_error` of their own."""
    own = getattr(type(method), "step_with_error", None)
    return own not in (None, SamplerBase.step_with_error)
