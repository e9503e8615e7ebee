"""Concatenation of samples and conditions of several branches into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor

from sampler.types import Branch, Level


def evaluated_rows(
    branch: Branch, count: int, nfe: list[int], device: torch.device, cost: int
) -> Tensor | None:
    """The indices of the rows to evaluate, on the device of x, None for all.

    Counts them, as `cost` rows of the network each.
    """
    if branch.rows is None or bool(branch.rows.all()):
        for b in range(count):
            nfe[b] += cost
        return None
    index = branch.rows.nonzero()[:, 0]
    for b in index.tolist():
        nfe[b] += cost
    return to_device(index, device)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the CPU, without waiting for what the device has still to do."""
    return value if device.type == "cpu" else value.pin_memory().to(device, non_blocking=True)


def cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def take_rows(cond: Any, rows: Tensor | None) -> Any:
    if rows is None:
        return cond

    def take(leaf: Any) -> Any:
        return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return map_tree(take, cond)


def stack(conds: list[Any]) -> Any:
    """Join condition trees: tensors are concatenated, other values must be equal."""
    if len(conds) == 1:
        return conds[0]
    if any(c is None for c in conds):
        if all(c is None for c in conds):
            return None
        raise ValueError("A rule needs a condition for every branch: give Cond(cond=, uncond=).")

    def join(*parts: Any) -> Any:
        if isinstance(parts[0], Tensor):
            return cat_rows(parts)
        if any(part != parts[0] for part in parts):
            raise ValueError(f"Branches disagree on {parts[0]!r:.40}; only tensors may differ.")
        return parts[0]

    return map_tree(join, *conds)


def cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along dim 0; texts [R, L, ...] of different lengths L are zero-padded.

    Families whose texts differ in length pass a mask as well, which is zero-padded likewise.
    """
    length = max(part.shape[1] if part.ndim > 1 else 0 for part in parts)
    if all(part.ndim < 2 or part.shape[1] == length for part in parts):
        return torch.cat(list(parts))
    short = [(part, (0,) * (2 * part.ndim - 3) + (length - part.shape[1],)) for part in parts]
    return torch.cat([torch.nn.functional.pad(part, by) for part, by in short])


def cat_level(level: Level, rows: list[Tensor | None]) -> Level:
    """Select per-row levels with their rows; a common level applies to all."""
    if not isinstance(level.sigma, Tensor):
        return level
    return Level(*(cat([v if r is None else v[r] for r in rows]) for v in level))
