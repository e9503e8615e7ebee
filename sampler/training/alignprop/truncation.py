"""Draws of the differentiated steps: one per update, equal in all processes.

Steps are numbered 0 (noisiest) to T − 1 (last). K is the number of final steps with gradient.
"""

from __future__ import annotations

import random
from statistics import NormalDist
from typing import Literal

Truncation = Literal["fixed", "uniform", "gaussian", "per_step", "spread"]


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

    fixed: the last k. uniform: from an index drawn in low..high (T − 1) on. gaussian: from the
    index int(x) on, x ~ N(mean·T, std·T) truncated to 1 <= x < T. per_step: step i where
    a number drawn in low..high (T) for that step alone is at most i; the last step always.
    spread: the steps floor((u + i)·T/k), i = 0..k − 1, u drawn in [0, 1).
    """
    if truncation == "spread":
        offset = generator.random()
        chosen = {min(int((offset + i) * total / k), total - 1) for i in range(k)}
        return [i in chosen for i in range(total)]
    if truncation == "per_step":
        top = total if high is None else high
        kept = [generator.randint(low, top) <= i for i in range(total)]
        return [*kept[:-1], True]
    if truncation == "fixed":
        first = total - k
    elif truncation == "uniform":
        first = generator.randint(low, total - 1 if high is None else high)
    elif total == 1:
        first = 0
    else:
        first = int(_truncated(generator, NormalDist(mean * total, std * total), 1, total))
        first = min(max(first, 1), total - 1)
    return [i >= first for i in range(total)]


def ended_early(kept: list[bool], early: int, generator: random.Random) -> list[bool]:
    """Return the kept steps of a run that ends with a jump at one of its last `early` steps.

    That step is differentiated where no step before it is.
    """
    end = len(kept) - 1 - generator.randrange(early)
    kept = kept[: end + 1]
    return kept if any(kept) else [*kept[:-1], True]


def _truncated(generator: random.Random, normal: NormalDist, low: float, high: float) -> float:
    """Draw from a normal distribution truncated to [low, high], by its inverse.

    Where the interval holds no representable probability, its bound nearest to the mean is it.
    """
    share = generator.uniform(normal.cdf(low), normal.cdf(high))
    if not 0 < share < 1:
        return min(max(normal.mean, low), high)
    return normal.inv_cdf(share)


def check_truncation(
    truncation: Truncation, total: int, k: int, low: int, high: int | None
) -> None:
    """Raise ValueError where a draw could fall outside 1 <= K <= T."""
    if truncation in ("fixed", "spread") and not 1 <= k <= total:
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
