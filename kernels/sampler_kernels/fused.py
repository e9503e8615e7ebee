"""The Triton backend: which formulas share a launch, and what is left to the reference.

Left to the reference, which is always right: float64, tensors of another device or shape than the
rest, coefficients that vary over other than the leading dimensions, gram over other than the
trailing ones, and more than 4 gram vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import autograd, torch_ops
from sampler_kernels.formulas import has_pivot, inputs_of, narrow
from sampler_kernels.programs import Formula
from sampler_kernels.reductions import Sums, joined_with, table_of, unmade
from sampler_kernels.rows import Lin
from sampler_kernels.scalars import PART, RowGram, RowScalar
from sampler_kernels.triton_ops import (
    compute_scalars,
    run_both,
    run_formula,
)

MAX_INPUTS, MAX_OUTPUTS, MAX_VECTORS = 8, 4, 4
# Other classes are stand-ins of tracers, without memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def settle(
    lins: list[Lin], dtype: torch.dtype = torch.float32, waiting: Sequence[Sums] = ()
) -> list[Tensor]:
    """The values of lazy formulas, [B, ...] each, in as few launches as their inputs allow.

    waiting: reductions to make on the way, where they fit.
    """
    done: dict[int, Tensor] = {}
    left: list[Lin] = []
    for lin in lins:
        if lin.op == "leaf" and lin.a.dtype == dtype:
            done[id(lin)] = lin.a
        elif not _fits([lin]):
            done[id(lin)] = torch_ops.settle([lin])[0].to(dtype)
        elif all(lin is not other for other in left):
            left.append(lin)
    for group in _groups(left):
        cut = [narrow(lin, MAX_INPUTS, lambda part: settle([part])[0]) for lin in group]
        for lin, value in zip(group, _launch_formula(cut, dtype, waiting), strict=True):
            done[id(lin)] = value
    return [done[id(lin)] for lin in lins]


def finish(lins: list[Lin], late: list[Any]) -> list[Tensor]:
    """The values of lazy formulas and of recorded scalars, with all that is left to reduce."""
    nodes = [n for leaf in late for n in (leaf.nodes if isinstance(leaf, RowGram) else [leaf])]
    values = settle(lins, waiting=unmade(nodes))
    compute_scalars([node for node in nodes if isinstance(node, RowScalar)])
    return [*values, *(leaf.tensor() for leaf in late)]


def gram(lins: list[Lin], axes: tuple[int, ...] | None) -> Any:
    """G[i, j] = <V_i, V_j> per row: `RowGram`, or the tensor where it has to be differentiable."""
    shape = tuple(lins[0].shape)
    first = 1 if axes is None else axes[0]
    trailing = axes is None or axes == tuple(range(first, len(shape)))
    if len(lins) > MAX_VECTORS or not trailing or not _fits(lins):
        return torch_ops.gram(lins, axes)
    rows = math.prod(shape[:first])
    kept = shape[:1] if axes is None else (*shape[:first], *(1,) * (len(shape) - first))
    tensors, scalars = inputs_of(lins)
    if len(tensors) > MAX_INPUTS or _rows(scalars, shape) > rows:
        lins = [Lin.of(value) for value in settle(lins)]
        tensors, scalars = inputs_of(lins)
    formula = Formula.of(lins)
    pairs = [(i, j) for i in range(len(lins)) for j in range(i, len(lins))]
    places = [[pairs.index((min(i, j), max(i, j))) for j in range(len(lins))]
              for i in range(len(lins))]  # fmt: skip
    if _must_differentiate(tensors, scalars):
        table = _torch_table(formula.coefficients, shape, rows)
        sums = autograd.gram(formula, pairs, table, rows)
        cells = torch.stack([torch.stack([sums[p] for p in line]) for line in places])
        return cells.view(len(lins), len(lins), *kept)
    sums, device = Sums(formula, lins, pairs, shape, rows), formula.like.device
    known = [RowScalar(PART, (sums, p), kept, device, False) for p in range(len(pairs))]
    return RowGram([[known[p] for p in line] for line in places])


def recorded(value: Tensor) -> Any:
    """A float32 tensor [B] whose arithmetic is recorded, unless torch has to see it."""
    if _must_differentiate([value], []):
        return value
    return RowScalar.of(value, tuple(value.shape), value.device)


def _launch_formula(lins: list[Lin], dtype: torch.dtype, waiting: Sequence[Sums]) -> list[Tensor]:
    tensors, scalars = inputs_of(lins)
    shape = tuple(lins[0].shape)
    rows = max(_rows(scalars, shape), shape[0])
    if _must_differentiate(tensors, scalars):
        formula = Formula.of(lins)
        table = _torch_table(formula.coefficients, shape, rows)
        return [y.to(dtype) for y in autograd.settle(formula, table, rows)]
    joined = joined_with(waiting, tensors, scalars, rows)
    formula = Formula.of([*lins, *(lin for sums in joined for lin in sums.lins)])
    table = table_of(formula.coefficients, shape, rows)
    if not joined:
        return run_formula(formula, table, rows, dtype)
    pairs, first = [], len(lins)
    for sums in joined:
        pairs += [(first + i, first + j) for i, j in sums.pairs]
        first += len(sums.lins)
    outs, made = run_both(formula, len(lins), pairs, table, rows, dtype)
    for sums, part in zip(joined, made.split([len(s.pairs) for s in joined]), strict=True):
        sums.value = part
    return outs


def _fits(lins: list[Lin]) -> bool:
    """Whether the kernels can compute these formulas."""
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
    # To the kernels, a row begins anew where a coefficient does.
    return _rows(scalars, tuple(like.shape)) == like.shape[0] or not has_pivot(lins)


def _rows(scalars: Sequence[Any], shape: tuple[int, ...]) -> int:
    """How many rows the finest coefficient tells apart; the batch where there is none."""
    finest = [math.prod(s.shape) for s in scalars if s.ndim == len(shape) > 1]
    return max([shape[0], *finest])


def _groups(lins: list[Lin]) -> list[list[Lin]]:
    """Formulas of one shape that share a launch: up to 8 inputs and 4 outputs."""
    groups: list[list[Lin]] = []
    for lin in lins:
        for group in groups:
            same = group[0].shape == lin.shape and len(group) < MAX_OUTPUTS
            if same and len(inputs_of([*group, lin])[0]) <= MAX_INPUTS:
                group.append(lin)
                break
        else:
            groups.append([lin])
    return groups


def _must_differentiate(tensors: Sequence[Tensor], scalars: Sequence[Any]) -> bool:
    """Whether torch has to see the operation: for autograd, or while torch.compile traces."""
    inputs = [t for t in (*tensors, *scalars) if isinstance(t, Tensor)]
    if torch.compiler.is_compiling() or any(type(t) not in _PLAIN for t in inputs):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _torch_table(coefficients: Sequence[Any], shape: tuple[int, ...], rows: int) -> Tensor | None:
    """The same in differentiable torch operations."""
    if not coefficients:
        return None
    lines = []
    for s in coefficients:
        s = s.tensor() if isinstance(s, RowScalar) else s
        s = s.float().reshape(-1, 1)
        lines.append(s.expand(s.shape[0], rows // s.shape[0]).reshape(rows))
    return torch.stack(lines)
