"""The guidance scale as an input of the network, as latent consistency models have it.

    e = [sin(1000·(w − 1)·f_k), cos(1000·(w − 1)·f_k)],   f_k = 10000^(−k/(D/2 − 1)), k < D/2

w is the guidance scale in our convention (1 is the conditional model), D the network's
`time_cond_proj_dim`. Luo et al. (2023), arXiv:2310.04378, section 4.3, with the factor 1000 and
the frequencies of diffusers' pipelines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_embedding(scale: Tensor, size: int) -> Tensor:
    """[B, size] float32 for guidance scales [B]; an odd size ends with a zero."""
    half = size // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step).to(scale.device)
    angles = (scale.float() - 1)[:, None] * 1000.0 * frequencies
    found = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(found, (0, size % 2))
