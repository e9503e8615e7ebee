"""UniPC and SA-Solver: a prediction, corrected by the evaluation that the next step makes anyway.

    corrected = c·x_0 + (alpha − c·alpha_0)·sum_j w_j·D_j + (x − mean),   c = k·sigma/sigma_0

repeats the step that led from x_0 to x, with the new D first among the nodes; mean is what was
predicted without the noise that was drawn, which stays. c, k, w as in `exponential.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sampler.samplers.exponential import History, Rule, combined
from sampler.samplers.multistep_weights import places
from sampler.samplers.shares import effective
from sampler.types import Level, Lin


class CorrectorState(NamedTuple):
    """The step that led here: where it began, with what history, and how it was made."""

    x: Any  # corrected x [B, ...] at `level`
    level: Level
    history: History  # (u, D) at `level` and before, newest first
    k: float
    mean: Any  # prediction without its noise; None where none was drawn
    number: int  # of the step
    order: int
    velocity: Any = None  # of heavy_ball


def target(history: History, end: float, k: float, rule: Rule, new: Lin | None = None) -> Lin:
    """e of a step from the newest value to the clock `end`; `new`: the value there, if known.

    A value without a clock (alpha = 0) has no weight.
    """
    start = history[0][0]
    known = [(u, D) for u, D in history if math.isfinite(u)] or list(history[:1])
    spots = places([u for u, _ in known], end) if math.isfinite(start) else (0.0,)
    values = [D for _, D in known]
    if new is not None:
        spots, values = (1.0, *spots), [new, *values]
    if len(values) == 1:
        return Lin.of(values[0])
    return combined(rule(spots, effective(end - start, k)), values)
