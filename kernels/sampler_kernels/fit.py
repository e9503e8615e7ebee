"""Decides which formulas the Triton kernels can compute, and which of them share a launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels.lin import Lin, replaced
from sampler_kernels.opcodes import FIRST
from sampler_kernels.programs import Formula
from sampler_kernels.scalars import RowScalar

MAX_INPUTS, MAX_OUTPUTS, MAX_VECTORS = 8, 4, 4
# Subclasses are stand-ins of tracers, without memory.
PLAIN: tuple[Any, ...] = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_LAYOUTS = 4096  # a run has a few dozen


class Layout:
    """Shared part of formulas of one program over tensors of equal types, shapes and devices.

    rows: the number of rows that the finest coefficient distinguishes; the batch without one.
    computable: the kernels can compute it; `shares_launch`: and all outputs in one launch. plain:
    torch need not trace it. contiguous: all tensors are. launches: what `triton_ops` has prepared;
    size: the length of the program, which further outputs over the same tensors extend.
    """

    __slots__ = ("computable", "contiguous", "launches", "plain", "rows", "shares_launch", "size")

    def __init__(self, formula: Formula, plain: bool) -> None:
        tensors = formula.tensors
        self.rows = _count_rows(formula.coefficients, tuple(tensors[0].shape)) if tensors else 0
        self.computable = bool(tensors) and _computable(formula, self.rows)
        few = len(tensors) <= MAX_INPUTS and len(formula.outs) <= MAX_OUTPUTS
        self.shares_launch = few and self.computable
        self.plain = plain
        self.contiguous = plain and all([x.is_contiguous() for x in tensors])
        self.size = len(formula.code)
        self.launches: dict[Any, Any] = {}


_layouts: dict[Any, Layout] = {}


def layout_of(formula: Formula) -> Layout:
    """The layout of a formula, cached by its program and by the properties of its inputs."""
    if formula.layout is None:
        formula.layout = _cached(formula)
    return formula.layout


def _cached(formula: Formula) -> Layout:
    if torch.compiler.is_compiling():  # shapes may be symbols
        return Layout(formula, plain=False)
    inputs: list[Any] = [tuple(formula.code), *formula.outs]
    for t in formula.tensors:
        if type(t) not in PLAIN:
            return Layout(formula, plain=False)
        inputs += t.dtype, t.shape, t.device, t.is_contiguous()
    for t in formula.coefficients:
        if type(t) is RowScalar:  # of float32
            inputs.append(t.extent)
        elif type(t) in PLAIN:
            inputs += t.dtype, t.shape, t.device
        else:
            return Layout(formula, plain=False)
    key = tuple(inputs)
    layout = _layouts.get(key)
    if layout is None:
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        layout = _layouts[key] = Layout(formula, plain=True)
    return layout


def must_differentiate(formula: Formula) -> bool:
    """Return True where torch must see the operation: for autograd, or while it compiles."""
    if not layout_of(formula).plain:
        return True
    return torch.is_grad_enabled() and any(
        t.requires_grad for t in (*formula.tensors, *formula.coefficients) if isinstance(t, Tensor)
    )


def is_plain(value: Tensor) -> bool:
    """Return True where torch need not see the arithmetic of a tensor."""
    if torch.compiler.is_compiling() or type(value) not in PLAIN:
        return False
    return not (torch.is_grad_enabled() and value.requires_grad)


def groups(lins: list[Lin]) -> list[list[Lin]]:
    """Formulas of one shape that share a launch: up to 8 inputs and 4 outputs."""
    found: list[list[Lin]] = []
    for lin in lins:
        for group in found:
            same = group[0].shape == lin.shape and len(group) < MAX_OUTPUTS
            if same and len(Formula([*group, lin]).tensors) <= MAX_INPUTS:
                group.append(lin)
                break
        else:
            found.append([lin])
    return found


def narrow(lin: Lin, compute: Callable[[Lin], Tensor]) -> Lin:
    """The same value over at most 8 tensors: its widest parts that fit are computed first."""
    while len(Formula([lin]).tensors) > MAX_INPUTS:
        nodes = _nodes(lin, {})
        width = [len(Formula([node]).tensors) for node in nodes]
        parts = [k for k in range(len(nodes)) if 1 < width[k] <= MAX_INPUTS]
        widest = nodes[max(parts, key=lambda k: width[k])]
        lin = replaced(lin, widest, Lin.of(compute(widest)), {})
    return lin


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


def _computable(formula: Formula, rows: int) -> bool:
    like = formula.tensors[0]
    if like.numel() == 0:
        return False
    for x in formula.tensors:
        if x.dtype not in _FLOATS or x.shape != like.shape or x.device != like.device:
            return False
    for s in formula.coefficients:
        shape = tuple(s.shape)
        if s.dtype not in _FLOATS or s.device != like.device:
            return False
        if len(shape) == like.ndim > 1 and math.prod(shape) > 1:
            lead = max(d for d, size in enumerate(shape) if size > 1) + 1
            if shape[:lead] != tuple(like.shape[:lead]):
                return False
    # To the kernels, every coefficient starts a new row.
    return rows == like.shape[0] or FIRST not in formula.code[::3]


def _count_rows(scalars: Sequence[Any], shape: tuple[int, ...]) -> int:
    finest = [math.prod(s.shape) for s in scalars if s.ndim == len(shape) > 1]
    return max([shape[0] if shape else 1, *finest])


def _nodes(node: Lin, known: dict[int, Lin]) -> list[Lin]:
    """Every node of a formula once, operands first."""
    if id(node) not in known:
        for child in (node.a, node.b):
            if isinstance(child, Lin):
                _nodes(child, known)
        known[id(node)] = node
    return list(known.values())
