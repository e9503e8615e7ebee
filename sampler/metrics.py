"""Figures of samples that need no reference images."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

# Statistics of COCO latents of Stable Diffusion 1.x's VAE, as the authors' code has them.
_STATISTICS = {
    "channel": (
        (0.1455953, -0.10772908, 0.023680864, 0.045954444),
        (0.9220753, 1.0913924, 0.73026365, 0.72270846),
    ),
    "global": ((0.02687545,) * 4, (0.8845245,) * 4),
}


def magnitude_score(
    latents: Tensor,
    kernel: int = 4,
    threshold: float = 3.0,
    statistics: Literal["channel", "global"] = "channel",
) -> Tensor:
    """How much of an image diverged: the magnitude score of Stable Diffusion 1.x latents, [B].

        m = max over channels of |(z − mean)/std|, max-pooled k x k with stride k;
        score = mean over cells of m where m >= threshold, else 0

    latents [B, 4, h, w], multiplied with the VAE's scaling factor; kernel k, 4 for 64 x 64 latents;
    threshold in standard deviations, the paper's 3; statistics: one mean and deviation per channel,
    or one for all. Higher is worse; it is not calibrated against human judgement, and its constants
    hold for that VAE only. The paper's text sums over the cells; its table and its code take their
    mean, as here.

    Raises ValueError for latents that do not have 4 channels, or are smaller than the kernel.

    Reference: Diffusion Sampling with Momentum for Mitigating Divergence Artifacts (Wizadwongsa et
    al., 2024), arXiv:2307.11118, section 5.
    """
    if latents.ndim != 4 or latents.shape[1] != 4 or min(latents.shape[2:]) < kernel:
        raise ValueError(
            f"magnitude_score needs latents [B, 4, h, w] with h, w >= {kernel}, "
            f"not {tuple(latents.shape)}."
        )
    mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in _STATISTICS[statistics])
    magnitude = ((latents - mean) / std).abs().amax(1, keepdim=True)
    cells = F.max_pool2d(magnitude, kernel)
    return (cells * (cells >= threshold)).flatten(1).mean(1)
