"""Draws of the differentiated steps: one per update, equal in all processes.

Steps are numbered 0 (noisiest) to T − 1 (last). K is the number of final steps with gradient.
"""

from __future__ import annotations

import random
from typing import Literal

Truncation = Literal["fixed", "uniform", "gaussian", "per_step"]


def kept_steps(
    truncation: Truncation,
    total: int,
    generator: random.Random,
    k: int,
    low: int,
    high: int | None,
    mean: float,
    std: float,
) -> list[bool]:
    """Return per step if its network evaluation is differentiated: T bools, at least one True.

    fixed: the last k. uniform: from an index drawn in low..high (T − 1) on. gaussian: from an
    index int(N(mean·T, std·T)) on, drawn again until it lies in 1..T − 1. per_step: step i where
    a number drawn in low..high (T) for that step alone is at most i; the last step always.
    """
    if truncation == "per_step":
        top = total if high is None else high
        kept = [generator.randint(low, top) <= i for i in range(total)]
        return [*kept[:-1], True]
    if truncation == "fixed":
        first = total - k
    elif truncation == "uniform":
        first = generator.randint(low, total - 1 if high is None else high)
    else:
        first = total - 1 if total == 1 else 0
        while not 1 <= first < total and total > 1:
            first = int(generator.gauss(mean * total, std * total))
    return [i >= first for i in range(total)]


def check_truncation(
    truncation: Truncation, total: int, k: int, low: int, high: int | None
) -> None:
    """Raise ValueError where a draw could fall outside 1 <= K <= T."""
    if truncation == "fixed" and not 1 <= k <= total:
        raise ValueError(
            f"alignprop: k = {k} must lie in 1..{total}, the number of sampling steps; "
            "raise steps or lower k."
        )
    limit = total if truncation == "per_step" else total - 1
    top = limit if high is None else high
    if truncation in ("uniform", "per_step") and not 0 <= low <= top <= limit:
        raise ValueError(
            f"alignprop: low = {low} and high = {high} must be indices 0 <= low <= high <= "
            f"{limit} of a run of {total} steps."
        )
