"""Per-sample state of adaptive guidance, updated on the device that computes the cosines.

Flags are 1 or 0: floats until the first γ, then float32 [B] on the latents' device. Updates are
arithmetic on them only, so that on a GPU they are recorded with the cosines and computed in the
same launch, without waiting for the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sampler_kernels import where


class StepFlags(NamedTuple):
    """The flags of one step, per sample.

    live: 1 where the pair is evaluated; latched: 1 where the sample has converged; wait: steps
    until the next refresh of a latched sample, None without refreshes.
    """

    live: Any
    latched: Any
    wait: Any = None


def initial(period: int) -> StepFlags:
    """All samples live; period: steps between refreshes, 0 for none."""
    return StepFlags(1.0, 0.0, period - 1.0 if period else None)


def advance(
    upcoming: tuple[StepFlags, ...],
    armed: Any,
    cosines: tuple[Any, ...],
    settings: tuple[float, float | None, int],
) -> tuple[tuple[StepFlags, ...], Any]:
    """(upcoming without the finished step and with a new decision at its end, armed).

    cosines: (γ,) or (γ, that of the new and the held direction), [B] each; () for a step without
    pairs. armed: 1 where a sample may latch. settings: (threshold, turn, period). NaN never
    crosses the threshold.
    """
    threshold, turn, period = settings
    last, turned = upcoming[-1], None
    latched = last.latched
    if cosines:
        # Every operation begins with a cosine or what is made of it, so that it is recorded. A
        # sample that is not live, whose γ means nothing, has latched, and was armed when it did.
        crossed = cosines[0] > threshold
        latching = where(crossed, armed, 0.0)
        latched = where(latching == 0, latched, 1.0)
        armed = where(crossed, latching, 1.0)
        if len(cosines) > 1:
            turned = where(cosines[1] < turn, upcoming[0].live, 0.0) * latched
    if period:
        last = _refreshed(latched, last, turned, period)
    elif cosines:
        last = StepFlags(1 - latched, latched)
    return (*upcoming[1:], last), armed


def _refreshed(latched: Any, before: StepFlags, turned: Any, period: int) -> StepFlags:
    """The decision after `before`, where latched samples are live again at their refreshes."""
    none = latched * 0.0  # first operand of the sums, so that they are recorded
    wait = where(none + before.live > 0, period - 1.0, none + before.wait - 1.0)
    if turned is not None:
        wait = where(turned > 0, 0.0, wait)
    live = where(latched > 0, where(wait == 0, 1.0, none), 1.0 + none)
    return StepFlags(live, latched, wait)
