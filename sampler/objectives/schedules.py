"""Schedules of training: old weights, times, windows of stochastic steps."""

from __future__ import annotations

import math
import random
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def old_decay(step: int, law: Literal["on_policy", "slow", "fast"]) -> float:
    """Decay d of the old weights after `step` optimiser steps: old ← d·old + (1 − d)·new.

        on_policy  0        slow  min(0.001·step, 0.5)
        fast       0 up to step 75, then min(0.0075·(step − 75), 0.999)

    Raises ValueError for an unknown law. Source: DiffusionNFT's `return_decay`.
    """
    if law == "on_policy":
        return 0.0
    if law == "slow":
        return min(0.001 * step, 0.5)
    if law == "fast":
        return min(0.0075 * max(0, step - 75), 0.999)
    raise ValueError(f"old_decay: {law!r} must be one of on_policy, slow, fast.")


def matching_times(
    u: ArrayLike,
    law: Literal["uniform", "logit_normal"] = "uniform",
    shift: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Floats:
    """Stratified flow levels sigma [K] from uniform numbers u [K], in Flow-Factory's form.

        p_k = (k + u_k)/K,   f = p (uniform) or sigmoid(normal quantile of p) (logit_normal)
        shifted: f ← shift·f/(1 + (shift − 1)·f),   sigma = 1 − f

    low, high: range of f, applied before the shift for "uniform" and after it for "logit_normal".
    This form shifts f, so that shift above 1 favours low noise; the samplers' and SD3's convention
    shifts sigma. Raises ValueError for an unknown law.

    Source: Flow-Factory's `TimeSampler`.
    """
    values = np.asarray(u, dtype=np.float64)
    p = (np.arange(values.size) + values) / values.size

    def shifted(f: Floats) -> Floats:
        return shift * f / (1 + (shift - 1) * f)

    if law == "uniform":
        return 1 - shifted(low + p * (high - low))
    if law == "logit_normal":
        quantile = torch.special.ndtri(torch.from_numpy(p))
        return 1 - (low + shifted(torch.sigmoid(quantile).numpy()) * (high - low))
    raise ValueError(f"matching_times: law = {law!r} must be one of uniform, logit_normal.")


def sde_window(
    update: int,
    size: int,
    total: int,
    every: int,
    strategy: Literal["progressive", "decay", "exp_decay", "random"] = "progressive",
    stride: int | None = None,
    roll_back: bool = False,
    decay: float = 0.1,
) -> tuple[int, int]:
    """First step and number of steps that draw noise at an update, after MixGRPO.

    The window [first, first + size) moves by `stride` (default: size) after a number of updates
    that depends on first (f = first/total):

        progressive  every
        decay        int(every·(1 − f) + max(1, every//4)·f), at least max(1, every//4)
        exp_decay    ceil(every·exp(−decay·max(0, first − 13)))
        random       drawn anew at every update, from (update, size, total)

    At the end it stops with the remaining steps, then none; with `roll_back` it starts again.
    Raises ValueError for an unknown strategy, and for a window longer than the run.

    Source: MixGRPO (Li et al., 2025), arXiv:2507.21802, and its published code.
    """
    if not 0 < size <= total:
        raise ValueError(f"sde_window: size = {size} must lie in 1..{total}, the number of steps.")
    if strategy == "random":
        first = random.Random(f"sde_window {update} {size} {total}").randint(0, total - size)
        return first, size
    least = max(1, every // 4)

    def length(first: int) -> float:
        if strategy == "progressive":
            return every
        if strategy == "decay":
            f = first / total
            return max(least, int(every * (1 - f) + least * f))
        if strategy == "exp_decay":
            return math.ceil(every * math.exp(-decay * max(0, first - 13)))
        raise ValueError(
            f"sde_window: strategy = {strategy!r} must be one of progressive, decay, "
            "exp_decay, random."
        )

    first, used = 0, 0
    for _ in range(update):
        used += 1
        if used >= length(first):
            first, used = first + (size if stride is None else stride), 0
        if first > total:
            first, used = (0, 0) if roll_back else (total, used)
    return first, max(0, min(size, total - first))
