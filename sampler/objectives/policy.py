"""Policy-gradient losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sampler.objectives.samples import broadcast, per_sample


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss, elementwise: max(−A·rho, −A·clip(rho, 1 − clip, 1 + clip)).

    rho = exp(log_ratio). Source: PPO (Schulman et al., 2017), arXiv:1707.06347, eq. 7.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def guarded_log_ratio(mean: Tensor, old_mean: Tensor, after: Tensor, std: Any) -> Tensor:
    """Log-ratio of GRPO-Guard in closed form, [B].

        g = mean(z·(mean − old_mean)),   z = (after − old_mean)/std

    z is the noise that was drawn, so E[g] = 0 under the old policy; the plain mean log-ratio has
    the mean −mean((mean − old_mean)²)/(2·std²) instead. mean, old_mean, after: [B, ...]; std: a
    number or [B], above 0.

    Source: GRPO-Guard (Wang et al., 2025), arXiv:2510.22319.
    """
    return per_sample((after - old_mean) / broadcast(std, mean) * (mean - old_mean))


def gaussian_kl(mean: Tensor, base_mean: Tensor, std: Any) -> Tensor:
    """KL of two Gaussian policies of one deviation, by the mean over the elements, [B].

        KL = mean((mean − base_mean)²)/(2·std²)

    std is that of the whole step, a number or [B]. Flow-GRPO's and verl-omni's code divides by the
    square of a `std_dev_t` with std = std_dev_t·sqrt(|dt|): their KL is |dt| times this one, and
    their weight of it 1/|dt| times ours. mean, base_mean: [B, ...].

    Source: Flow-GRPO (Liu et al., 2025), arXiv:2505.05470.
    """
    gap = (mean - base_mean) / broadcast(std, mean)
    return per_sample(gap * gap) / 2


def dppo_keep(
    mean: Tensor,
    old_mean: Tensor,
    std: Any,
    log_ratio: Tensor,
    advantage: Tensor,
    threshold: float,
) -> Tensor:
    """Mask of the samples whose update stays inside the trust region, bool [B].

    A sample is left out where KL >= threshold and its ratio moves further away in the direction of
    its advantage (rho > 1 with A > 0, or rho < 1 with A < 0);
    KL: that of `gaussian_kl` to the old policy. mean, old_mean: [B, ...]; std: a number or [B].

    Source: verl-omni's `FlowDPPOLoss`.
    """
    outside = gaussian_kl(mean, old_mean, std) >= threshold
    away = ((log_ratio > 0) & (advantage > 0)) | ((log_ratio < 0) & (advantage < 0))
    return ~(outside & away)
