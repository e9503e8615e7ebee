"""The two halves of a step: evaluation with guidance, and the move with its noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sampler_kernels import Lin, settle

from sampler.core.noise import Noise
from sampler.types import Branch, Cond, Denoiser, Guidance, Move, Prediction, Snapshot, Span


def evaluate(
    denoiser: Denoiser,
    snapshot: Snapshot,
    span: Span,
    branches: Mapping[str, Branch],
    rule: Guidance,
) -> tuple[Prediction, Any, tuple[int, ...]]:
    """First half: (guided prediction, the rule's next state, NFE per sample).

    branches: those that the rule has planned; without any, the network is not called.
    """
    nfe = list(snapshot.nfe)
    preds: Mapping[str, Prediction] = {}
    if branches:
        preds = denoiser(snapshot.x, span, branches, nfe)
    pred, state = rule.combine(snapshot.x, preds, span, snapshot.guidance)
    return pred, state, tuple(nfe)


def apply_move(snapshot: Snapshot, move: Move, guidance: Any, nfe: tuple[int, ...]) -> Snapshot:
    """Second half: draw the noise of a move and compute the next snapshot."""
    x = Lin.of(move.mean)
    if not isinstance(move.std, (int, float)) or move.std != 0:
        noise = Noise(snapshot.seeds).of_move(snapshot.index, x.like, move.over)
        x = x + move.std * Lin.of(noise)
    x, state, guidance = settle((x, move.state, guidance))
    return Snapshot(snapshot.index + 1, x, state, guidance, snapshot.seeds, nfe)


def seeded(cond: Any, snapshot: Snapshot) -> Cond:
    """The conditions, with the samples' seeds (int64 [B]) for rules that draw noise."""
    cond = as_cond(cond)
    if "seeds" in cond.extra:
        return cond
    return replace(cond, extra={**cond.extra, "seeds": torch.tensor(snapshot.seeds)})


def as_cond(cond: Any) -> Cond:
    """Conditions given as `Cond`, or those of the branch "cond" alone."""
    return cond if isinstance(cond, Cond) else Cond(cond=cond)
