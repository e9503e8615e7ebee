"""Per-sample state of adaptive guidance, updated on the device.

Flags are 1 or 0: numbers until a γ was computed, then float32 [B] beside the latents. Deciding is
arithmetic on them, so that on a GPU it is recorded with the cosines, computed in their launch, and
the CPU is not waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sampler_kernels import where

if TYPE_CHECKING:
    from torch import Tensor

    Flags = float | Tensor


class Decision(NamedTuple):
    """Decision for one step, per sample.

    live: 1 where both branches are evaluated; latched: 1 where γ has converged; wait: steps until
    the next refresh of a latched sample, None without refreshes.
    """

    live: Flags
    latched: Flags
    wait: Flags | None = None


class AdaptiveState(NamedTuple):
    """rule: state of the inner rule.

    pending: decisions for the next 1 + lag guided steps, on the device of x.
    may_latch: 1 where a sample may latch, else 0, as the flags; None before the first guided step.
    direction: c − u of the last live step [B, ...] (after="hold", or with `turn`), or None.
    """

    rule: Any
    pending: tuple[Decision, ...]
    may_latch: Flags | None = None
    direction: Any = None


def initial_decision(period: int) -> Decision:
    """All samples live; period: steps between refreshes, 0 for none."""
    return Decision(1.0, 0.0, period - 1.0 if period else None)


def next_decisions(
    pending: tuple[Decision, ...],
    may_latch: Flags,
    cosines: tuple[Tensor, ...],
    settings: tuple[float, float | None, int],
) -> tuple[tuple[Decision, ...], Flags]:
    """(pending without the finished step and with a new decision at its end, may_latch).

    cosines: (γ,) or (γ, cosine of the new and the held direction), [B] each; () for a step without
    pairs. settings: (threshold, turn, period). NaN never crosses a threshold.
    """
    threshold, turn, period = settings
    last, turned = pending[-1], None
    latched = last.latched
    if cosines:
        crossed = cosines[0] > threshold
        live = where(crossed, 0.0, 0.0) + pending[0].live
        latched = _either(where(crossed, 1.0, 0.0) * live * may_latch, latched)
        may_latch = _either(where(crossed, 0.0, 1.0) * live, may_latch)
        if len(cosines) > 1:
            turned = where(cosines[1] < turn, 1.0, 0.0) * live * latched
    if period:
        last = _refreshed(latched, last, turned, period)
    elif cosines:
        last = Decision(1 - latched, latched)
    return (*pending[1:], last), may_latch


def _refreshed(latched: Flags, before: Decision, turned: Flags | None, period: int) -> Decision:
    """The decision after `before`, where latched samples are live again at their refreshes."""
    none = latched * 0.0  # first operand of every sum, so that a lazy flag records it
    wait = where(none + before.live > 0, period - 1.0, none + before.wait - 1.0)
    if turned is not None:
        wait = where(turned > 0, 0.0, wait)
    live = where(latched > 0, where(wait == 0, 1.0, none), 1.0 + none)
    return Decision(live, latched, wait)


def _either(a: Flags, b: Flags) -> Flags:
    """1 where one of two flags is 1, else 0."""
    return a + b - a * b
