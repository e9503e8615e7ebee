"""When a rule guides: an interval of noise levels, a window of steps.

    interval (low, high]: on where low < sigma/alpha <= high (sigma/alpha is the EDM sigma)
    window [first, last): on for the steps first, ..., last − 1, counted from the start of the run

Outside, a rule answers with the conditional prediction and asks for that one pass only.
Reference: Applying Guidance in a Limited Interval (Kynkäänniemi et al., 2024), arXiv:2404.07724.
The step window is the setting of diffusers' guiders, and with first = 0 it is Step AG
(arXiv:2506.08351): guidance for the first steps only.
"""

from __future__ import annotations

import math

from sampler.types import Level, Span

Interval = tuple[float, float]
Window = tuple[int, int]


def inside(interval: Interval | None, level: Level) -> bool:
    """Whether low < sigma/alpha <= high: open below, closed above; always without an interval."""
    if interval is None:
        return True
    sigma = level.sigma / level.alpha if level.alpha else math.inf
    return interval[0] < sigma <= interval[1]


def active(interval: Interval | None, window: Window | None, span: Span) -> bool:
    """Whether a rule with this interval and this window guides at this step."""
    if window is not None and not window[0] <= span.index < window[1]:
        return False
    return inside(interval, span.now)


def step_window(start: float, stop: float, steps: int) -> Window:
    """The window of fractions of a run, as diffusers' guiders read them.

        first = int(start·steps),   last = int(stop·steps)

    Both are truncated: (0.33, 0.34) of 20 steps is empty. Raises ValueError outside 0..1.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"step_window: ({start}, {stop}) must satisfy 0 <= start <= stop <= 1.")
    return int(start * steps), int(stop * steps)


def check_gates(name: str, interval: Interval | None, window: Window | None) -> None:
    """Raises ValueError for an interval or a window that is upside down."""
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(
            f"{name}: interval = {interval} must be (low, high) with 0 <= low < high, in "
            "sigma/alpha."
        )
    if window is not None and not 0 <= window[0] <= window[1]:
        raise ValueError(
            f"{name}: window = {window} must be (first, last) with 0 <= first <= last, in steps; "
            "see sampler.guidance.gates.step_window for fractions."
        )


def check_scale(name: str, value: float, field: str = "scale") -> None:
    """Raises ValueError for a scale that is no number >= 0; a tensor [B] was checked by rows."""
    if not hasattr(value, "shape") and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {field} = {value} must be a number >= 0 (1 is no guidance).")


def is_one(scale: float) -> bool:
    """Whether a scale means no guidance, so that its branch must not be paid for."""
    return not hasattr(scale, "shape") and math.isclose(scale, 1, rel_tol=1e-9)


def is_zero(scale: float) -> bool:
    """Whether a scale asks for the unconditional model alone."""
    return not hasattr(scale, "shape") and scale == 0
