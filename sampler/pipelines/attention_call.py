"""Calls of torch's attention, intercepted, and their probabilities."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Intercepted(TorchFunctionMode):
    """Inside, the probabilities of torch's attention are given to `keep`, which may replace it."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = _ARGUMENTS.bind(*args, **(kwargs or {}))
        given.apply_defaults()
        own = self.keep(**given.arguments)
        return func(*args, **(kwargs or {})) if own is None else own


def _arguments(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> None:  # fmt: skip
    """Signature of torch's attention, which is a builtin without one."""


_ARGUMENTS = inspect.signature(_arguments)


def probabilities(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool
) -> Tensor:
    """softmax(q·kᵀ·scale + mask) [R, heads, S, K]; half precision is computed in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if key.shape[1] != query.shape[1]:  # grouped queries
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(wide)
    return scores.softmax(-1)
