"""Losses on clean latents: forward-process and preference objectives, direct alignment."""

from __future__ import annotations

from typing import Any, Literal

import torch
from sampler_kernels import settle
from torch import Tensor

from sampler.objectives.samples import broadcast, per_sample
from sampler.types import Level, Prediction


def _x0(value: Prediction | Tensor) -> Tensor:
    return settle(value.x0) if isinstance(value, Prediction) else value


def nft_loss(
    pred: Prediction | Tensor,
    old: Prediction | Tensor,
    x0: Tensor,
    r: Tensor,
    beta: float,
    floor: float = 1e-5,
) -> Tensor:
    """Loss of DiffusionNFT without its factor A_max, [B].

        D± = D_old ± beta·(D − D_old)
        loss = 1/beta·[r·mean((D₊ − x0)²)/n₊ + (1 − r)·mean((D₋ − x0)²)/n₋]
        n± = max(mean|D± − x0|, floor), without gradient

    pred, old: predictions at the same x, or estimates of x0 [B, ...]; x0 [B, ...]; r [B] in
    [0, 1], see `optimality`; beta above 0.

    Source: DiffusionNFT (Zheng et al., 2025), arXiv:2509.16117, and its published code.
    """
    new_x0, old_x0 = _x0(pred), _x0(old).detach()

    def branch(sign: int) -> Tensor:
        error = old_x0 + sign * beta * (new_x0 - old_x0) - x0
        with torch.no_grad():
            scale = per_sample(error.abs().double()).clamp(min=floor).to(error.dtype)
        return per_sample(error * error) / scale

    return (r * branch(1) + (1 - r) * branch(-1)) / beta


def denoising_error(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the network's output in its own parametrisation, [B].

        e = mean((out − out*)²),   out* = eps, x0, alpha·eps − sigma·x0 (v) or eps − x0 (velocity)

    pred: at x = alpha·x0 + sigma·eps, of one level or one per sample; x0, eps [B, ...].
    """
    level = pred.level
    alpha, sigma = broadcast(level.alpha, x0), broadcast(level.sigma, x0)
    exact = {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "velocity": lambda: eps - x0,
    }[pred.kind]()
    return per_sample((settle(pred.out) - exact) ** 2)


def output_distance(a: Prediction, b: Prediction) -> Tensor:
    """Mean squared distance of two networks' outputs at the same x, [B]."""
    return per_sample((settle(a.out) - settle(b.out)) ** 2)


def velocity_distance(a: Prediction, b: Prediction) -> Tensor:
    """Mean squared distance of two predictions' velocities eps − x0, [B].

    One number whatever the networks predict. a, b: at the same x.
    """
    return per_sample((settle(a.velocity) - settle(b.velocity)) ** 2)


def min_snr_weight(kind: str, level: Level, gamma: float = 5.0) -> Tensor:
    """Factors of `denoising_error` that weight the error of x0 by min(SNR, gamma), float64 [B].

        eps: min(SNR, gamma)/SNR     x0: min(SNR, gamma)     v, velocity: min(SNR, gamma)·sigma²

    SNR = alpha²/sigma². level: of each sample, tensors [B] or numbers; v with alpha² + sigma² = 1,
    velocity with alpha + sigma = 1. At alpha = 0 the factor of eps is 1, at sigma = 0 that of x0
    is gamma. Raises ValueError for an unknown kind.

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023),
    arXiv:2303.09556, for x0; the others by the change of the prediction.
    """
    tiny = 1e-20
    signal, noise = (torch.as_tensor(v, dtype=torch.float64) ** 2 for v in level[1:])
    signal, noise = signal.clamp(min=tiny), noise.clamp(min=tiny)
    least = torch.minimum(signal, gamma * noise)
    if kind == "eps":
        return least / signal
    if kind == "x0":
        return least / noise
    if kind in ("v", "velocity"):
        return least
    raise ValueError(f"min_snr_weight: {kind!r} must be one of eps, x0, v, velocity.")


def matching_log_prob(
    pred: Prediction,
    x0: Tensor,
    eps: Tensor,
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber",
    power: float = 0.25,
) -> Tensor:
    """Weighted matching error as a log-probability, [B].

        log p = −w(sigma, e),   e = mean((out − out*)²)

        uniform  e                    t  sigma·e                   t2  sigma²·e
        huber    sigma·(sqrt(e + 1e-10) − 1e-5)
        ghuber   sigma/power·((e + 1e-10)^power − 1e-10^power)

    out is the network's output in its own parametrisation and out* the exact one for x0 and eps
    [B, ...]; sigma is that of `pred.level`. Raises ValueError for an unknown weighting.

    Source: advantage-weighted matching (Xue et al., 2025), arXiv:2509.25050, and its code.
    """
    e, s = denoising_error(pred, x0, eps), pred.level.sigma
    if weighting == "uniform":
        return -e
    if weighting == "t":
        return -s * e
    if weighting == "t2":
        return -s * s * e
    if weighting == "huber":
        return -s * ((e + 1e-10).sqrt() - 1e-5)
    if weighting == "ghuber":
        return -s / power * ((e + 1e-10) ** power - 1e-10**power)
    raise ValueError(
        f"matching_log_prob: weighting = {weighting!r} must be one of uniform, t, t2, huber, "
        "ghuber."
    )


def dpo_loss(error: Tensor, base_error: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss of pairs, [P].

        loss = −log sigmoid(−beta/2·[(e_w − e_w^base) − (e_l − e_l^base)])

    error, base_error [P, 2]: mean squared errors of the trained and the base model, the winner's
    first, both at the same level and noise.

    Source: Diffusion-DPO (Wallace et al., 2023), arXiv:2311.12908, eq. 14.
    """
    gain = error - base_error
    return -torch.nn.functional.logsigmoid(-beta / 2 * (gain[:, 0] - gain[:, 1]))


def direct_align(velocity: Tensor, image: Tensor, noise: Tensor, start: Any, end: Any) -> Tensor:
    """Estimate of the image after one Euler step, with the known noise removed, [B, ...].

        x = (1 − start)·image + start·noise
        x̂0 = (x + (end − start)·velocity − end·noise)/(1 − end)

    It equals image + w·(D − image) with w = (start − end)/(start·(1 − end)), D the estimate of x0.
    velocity: the network's output at (x, start). start, end: numbers in (0, 1), or [B].

    Source: SRPO (Shen et al., 2025), arXiv:2509.06942, eq. 7 to 9.
    """
    a, b = broadcast(start, image), broadcast(end, image)
    x = (1 - a) * image + a * noise
    return (x + (b - a) * velocity - b * noise) / (1 - b)
