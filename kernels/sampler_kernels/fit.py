"""Decides which formulas the Triton kernels can compute, and which of them share a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels.lin import Lin, has_pivot, inputs_of
from sampler_kernels.scalars import RowScalar

MAX_INPUTS, MAX_OUTPUTS, MAX_VECTORS = 8, 4, 4
# Subclasses are stand-ins of tracers, without memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fits(lins: list[Lin]) -> bool:
    """True where the kernels can compute these formulas."""
    tensors, scalars = inputs_of(lins)
    if not tensors or tensors[0].numel() == 0:
        return False
    like = tensors[0]
    for x in tensors:
        if x.dtype not in _FLOATS or x.shape != like.shape or x.device != like.device:
            return False
    for s in scalars:
        shape = tuple(s.shape)
        if s.dtype not in _FLOATS or s.device != like.device:
            return False
        if len(shape) == like.ndim > 1 and math.prod(shape) > 1:
            lead = max(d for d, size in enumerate(shape) if size > 1) + 1
            if shape[:lead] != tuple(like.shape[:lead]):
                return False
    # To the kernels, every coefficient starts a new row.
    return count_rows(scalars, tuple(like.shape)) == like.shape[0] or not has_pivot(lins)


def count_rows(scalars: Sequence[Any], shape: tuple[int, ...]) -> int:
    """The number of rows that the finest coefficient distinguishes; the batch without one."""
    finest = [math.prod(s.shape) for s in scalars if s.ndim == len(shape) > 1]
    return max([shape[0], *finest])


def groups(lins: list[Lin]) -> list[list[Lin]]:
    """Formulas of one shape that share a launch: up to 8 inputs and 4 outputs."""
    found: list[list[Lin]] = []
    for lin in lins:
        for group in found:
            same = group[0].shape == lin.shape and len(group) < MAX_OUTPUTS
            if same and len(inputs_of([*group, lin])[0]) <= MAX_INPUTS:
                group.append(lin)
                break
        else:
            found.append([lin])
    return found


def must_differentiate(tensors: Sequence[Any], scalars: Sequence[Any]) -> bool:
    """True where torch has to see the operation: for autograd, or while torch.compile traces."""
    inputs = [t for t in (*tensors, *scalars) if isinstance(t, Tensor)]
    if torch.compiler.is_compiling() or any(type(t) not in _PLAIN for t in inputs):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def torch_table(coefficients: Sequence[Any], rows: int) -> Tensor | None:
    """The coefficients that are not launch constants, [C, rows], in differentiable operations."""
    if not coefficients:
        return None
    lines: list[Tensor] = []
    for s in coefficients:
        s = s.tensor() if isinstance(s, RowScalar) else s
        s = s.float().reshape(-1, 1)
        lines.append(s.expand(s.shape[0], rows // s.shape[0]).reshape(rows))
    return torch.stack(lines)
