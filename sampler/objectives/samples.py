"""Helpers for values per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def per_sample(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [B, ...] -> [B]."""
    return values.flatten(1).mean(1)


def broadcast(value: Any, like: Tensor) -> Any:
    """A number, or one number per sample [B] shaped to multiply `like` [B, ...]."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return value.view(-1, *[1] * (like.ndim - 1))
    return value
