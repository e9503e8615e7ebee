"""Losses of few-step students."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sampler.objectives.samples import broadcast, per_sample
from sampler.types import Level


def _forward(mid: Level, now: Level, like: Tensor) -> tuple[Any, Any]:
    """Scale and deviation of the forward process from level mid to the noisier level now."""
    scale = broadcast(now.alpha / mid.alpha, like)
    variance = broadcast(now.sigma, like) ** 2 - scale**2 * broadcast(mid.sigma, like) ** 2
    # rounding makes it negative where the two levels are equal
    variance = variance.clamp(min=0) if isinstance(variance, Tensor) else max(variance, 0.0)
    return scale, variance**0.5


def renoised(x: Tensor, mid: Level, now: Level, noise: Tensor) -> Tensor:
    """Forward diffusion of x [B, ...] from level `mid` to the noisier level `now`.

        x_now = (alpha_now/alpha_mid)·x + sqrt(sigma_now² − (alpha_now/alpha_mid)²·sigma_mid²)·noise

    Source: TDM (Luo et al., 2025), arXiv:2503.06674.
    """
    scale, deviation = _forward(mid, now, x)
    return scale * x + deviation * noise


def mixed_noise(model_eps: Tensor, noise: Tensor, mid: Level, now: Level) -> Tensor:
    """Noise of a renoised sample relative to the student's x0, unit variance, [B, ...].

        m = ((alpha_now/alpha_mid)·sigma_mid·model_eps + sqrt(...)·noise)/sigma_now

    with the square root of `renoised`; model_eps: the eps that carried x0 to level `mid`.
    Source: TDM (Luo et al., 2025), arXiv:2503.06674.
    """
    scale, deviation = _forward(mid, now, noise)
    carried = scale * broadcast(mid.sigma, noise) * model_eps
    return (carried + deviation * noise) / broadcast(now.sigma, noise)


def fake_score_loss(
    fake: Tensor, model: Tensor, now: Level, mixed: Tensor, noise: Tensor
) -> Tensor:
    """Denoising loss of TDM's fake score, [B].

        min(SNR, 5)·mean((fake − model)²)·exp(mean(noise²)/2 − mean(mixed²)/2)

    SNR = alpha²/sigma² at level `now`.

    fake: its estimate of x0 at level `now`; model: the student's x0 (no gradient); mixed: see
    `mixed_noise`. Source: TDM (Luo et al., 2025), arXiv:2503.06674, and its published code.
    """
    snr = (now.alpha / now.sigma) ** 2
    snr = snr.clamp(max=5) if isinstance(snr, Tensor) else min(snr, 5.0)
    weight = torch.exp((per_sample(noise * noise) - per_sample(mixed * mixed)) / 2)
    return snr * per_sample((fake - model.detach()) ** 2) * weight


def student_loss(model: Tensor, guided: Tensor, fake: Tensor, huber: float | None = None) -> Tensor:
    """Loss of TDM's student, [B].

        mean((D − sg(D + guided − fake))²)/mean|D − guided|

    huber c: sqrt(d² + c²) − c in place of d². model: the student's D with gradient; guided, fake:
    the teacher's guided and the fake score's estimates of x0 at the renoised sample.
    Source: TDM (Luo et al., 2025), arXiv:2503.06674, and its published code.
    """
    with torch.no_grad():
        scale = per_sample((model - guided).abs())
        target = model + guided - fake
    gap = (model - target) ** 2
    if huber is not None:
        gap = (gap + huber**2).sqrt() - huber
    return per_sample(gap) / scale
