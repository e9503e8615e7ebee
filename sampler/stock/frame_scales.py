"""Formulas of stock pipelines whose guidance scale grows along the frames of a video.

Frame f is guided at w_f (Stable Video Diffusion):

    M_f = u_f + w_f·(c_f − u_f) = c_f + (w − 1)·(c_f − u'_f)     w = max w_f
    u'_f = c_f + (w_f − 1)/(w − 1)·(u_f − c_f)

so that a rule at scale w over c and u' guides every frame by its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sampler.stock.forms import Form
from sampler.stock.rescaling import relative
from sampler.stock.roles import SLACK, roles_of


def scaled_by_frame(
    form: Form, blocks: Sequence[Tensor], m: Tensor, bar: float, name: str
) -> Form | None:
    """A formula of two branches whose scale differs along one dimension of videos, else None."""
    if len(blocks) != 2 or m.ndim != 5:
        return None
    first, other = (block.detach().double() for block in blocks)
    difference = other - first
    for dim in (1, 2):
        rest = [one for one in range(m.ndim) if one != dim]
        moved = ((m - first) * difference).sum(rest) / difference.square().sum(rest)
        shape = [-1 if one == dim else 1 for one in range(m.ndim)]
        error = relative(first + moved.view(shape) * difference, m)
        if len(moved) < 2 or not error <= bar:
            continue
        scales = torch.stack([1 - moved, moved])  # of each block as cond
        cond = int(scales[1].max() >= scales[0].max())
        top = float(scales[cond].max())
        weights = (1 - top, top) if cond else (top, 1 - top)
        roles = roles_of(weights, True, SLACK * bar, name)
        if top <= 1 + SLACK * bar:
            return None
        shares = tuple(((scales[cond] - 1) / (top - 1)).tolist())
        return replace(
            form, weights=weights, roles=roles, shares=shares, share_dim=dim, settled=True,
            error=error,
        )  # fmt: skip
    return None
