"""Values that the loop passes on, and the base classes of strategies.

Notation, everywhere in this project:

    x_t = alpha · x0 + sigma · eps        x, x0, eps: [B, ...], one row per sample
    v        = alpha · eps − sigma · x0   (variance preserving: alpha² + sigma² = 1)
    velocity = eps − x0                   (flow matching: alpha = 1 − sigma)

A level is (alpha, sigma) and the time input of the network, `t`. Betas, log-SNR and flow times
exist in `schedule.py` only. Nothing here imports torch, so that `sampler list` starts at once.
"""

from __future__ import annotations

from sampler_kernels import Lin, gram, settle, sqrt

from sampler.types.prediction import KINDS, Prediction
from sampler.types.strategies import Denoiser, Guidance, GuidanceBase, Sampler, SamplerBase
from sampler.types.values import (
    MAX_SEED,
    Branch,
    Cond,
    Level,
    Move,
    Snapshot,
    Span,
    Watch,
    spans,
)

__all__ = [
    "KINDS",
    "MAX_SEED",
    "Branch",
    "Cond",
    "Denoiser",
    "Guidance",
    "GuidanceBase",
    "Level",
    "Lin",
    "Move",
    "Prediction",
    "Sampler",
    "SamplerBase",
    "Snapshot",
    "Span",
    "Watch",
    "gram",
    "settle",
    "spans",
    "sqrt",
]
