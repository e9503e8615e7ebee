"""Estimate of a run's discretisation error, from the evaluations that the run makes anyway.

    solver_error = sum over steps of ‖x'_{p+1} − x'_p‖/sqrt(D),   D = number of elements of x

x'_p is the mean of the step as taken, x'_{p+1} that of the next higher order. Their difference is a
sum of terms that the steps compute anyway (`SamplerBase.error_term`, `error_weights`). The terms of
several steps are kept and summed together, so that a step costs next to nothing. Per row: a row's
value does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
from sampler_kernels import Lin, gram, settle
from torch import Tensor

from sampler.core.rows import has_levels_of_rows
from sampler.core.stacking import to_device
from sampler.core.trajectory import Run
from sampler.types import Level, Move, Prediction, Sampler, SamplerBase, Snapshot, Span, spans

KEPT_STEPS, KEPT_BYTES = 32, 4 * 2**20
"""The most terms that are kept before their errors are formed: more would leave the cache."""


class Recorded(NamedTuple):
    """State of a sampler, and the term [B, ...] of its last step; None where it had none."""

    state: Any
    term: Any = None


@dataclass(frozen=True)
class Recorder:
    """A sampler that takes the same steps as `method` and leaves their terms in its state."""

    method: Sampler

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def stochastic(self) -> bool:
        return self.method.stochastic

    @property
    def draws(self) -> tuple[str, ...]:
        return self.method.draws

    def step(self, x: Any, pred: Prediction, span: Span, state: Recorded) -> Move:
        move = self.method.step(x, pred, span, state.state)
        term = self.method.error_term(pred, move, span, state.state)
        return Move(move.mean, move.std, Recorded(move.state, term), move.over)

    def finish(self, x: Any, state: Recorded) -> Any:
        return self.method.finish(x, state.state)


class SolverError:
    """Sum of the local errors of a run.

    Called with every snapshot of `self.run`, which takes the steps of the run given; `on_step`, if
    there is one, is then called with the snapshot of that one.
    """

    def __init__(self, run: Run, on_step: Callable[[Snapshot], None] | None = None) -> None:
        start, recorder = run.snapshot, cast(Any, Recorder(run.method))
        start = start._replace(sampler=Recorded(start.sampler))
        self.run = run._replace(snapshot=start, method=recorder)
        self._on_step = on_step
        self._weights = _weights(run.method, run.levels)
        self._reach = max(map(len, self._weights), default=0) - 1
        self._terms: dict[int, Tensor] = {}  # by step
        self._most = 0  # of them; 0 until their size is known
        self._next = start.index  # first step whose error is not formed yet
        self._squares: list[Tensor] = []  # [N, B], of N steps each: squared norms, and
        self._factors: list[float] = []  # what the norms of the steps are multiplied by

    def __call__(self, snapshot: Snapshot) -> None:
        state, term = snapshot.sampler
        if term is not None:
            self._terms[snapshot.index - 1] = term
            if not self._most:
                size = term.numel() * term.element_size()
                self._most = max(1, min(KEPT_STEPS, KEPT_BYTES // size)) + self._reach
            if len(self._terms) >= self._most:
                self._form()
        if self._on_step is not None:
            self._on_step(snapshot._replace(sampler=state))

    def total(self) -> tuple[float, ...] | None:
        """The sums, one per row; None where nothing was estimated."""
        self._form()
        if not self._squares:
            return None
        rows: list[list[float]] = cast(Any, torch.cat(self._squares).T).tolist()
        found = [zip(self._factors, row, strict=True) for row in rows]
        return tuple(math.fsum(f * math.sqrt(square) for f, square in row) for row in found)

    def _form(self) -> None:
        """Form the errors of the steps since the last time, in one pass over their terms."""
        end = max(self._terms, default=-1) + 1
        steps = [k for k in range(self._next, end) if self._weights[k] and k in self._terms]
        if steps:
            count = math.prod(self._terms[steps[0]].shape[1:])
            gaps, factors = self._gaps(steps)
            self._squares.append(settle(gram(gaps)[0, 0]).view(len(steps), -1))
            self._factors += [abs(factor) / math.sqrt(count) for factor in factors]
        self._next = end
        self._terms = {k: term for k, term in self._terms.items() if k >= end - self._reach}

    def _gaps(self, steps: list[int]) -> tuple[Lin, Sequence[float]]:
        """x'_{p+1} − x'_p [N·B, ...] of N steps one after the other, without a factor per step."""
        terms, weights = self._terms, [self._weights[k] for k in steps]
        newest = Lin.of(torch.cat([terms[k] for k in steps]))
        total, rows = Lin.zero(newest), newest.shape[0] // len(steps)
        columns = [*enumerate(zip_longest(*weights, fillvalue=0.0))]
        columns = [(place, column) for place, column in columns if any(column)]
        for place, column in columns:
            part = newest
            if place:
                older = [k - place if w else k for k, w in zip(steps, column, strict=True)]
                part = Lin.of(torch.cat([terms[k] for k in older])) - newest
            if len(columns) == 1:
                return part, column
            w = torch.tensor(column, dtype=newest.like.dtype).repeat_interleave(rows)
            total = total + to_device(w, newest.like.device) * part
        return total, (1.0,) * len(steps)


@lru_cache(maxsize=32)
def _weights(method: Sampler, levels: tuple[Level, ...]) -> tuple[tuple[float, ...], ...]:
    """`error_weights` of every step of a grid; kept, since every batch takes the same steps."""
    steps = spans(levels)
    return tuple(method.error_weights(steps[: k + 1]) for k in range(len(steps)))


def has_estimate(run: Run) -> bool:
    """Return True for a run whose sampler has errors, over levels that all samples share."""
    own = type(run.method).error_weights is not SamplerBase.error_weights
    return own and not has_levels_of_rows(run.levels)
