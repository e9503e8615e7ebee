"""The Triton backend.

Left to the reference, which computes every formula: float64, tensors of different devices or
shapes, coefficients that vary over other than the leading dimensions, gram over other than the
trailing ones, and more than 4 gram vectors.

Where torch has to see an operation (autograd, torch.compile), it is one of `operators`. Otherwise
values of a structure that has come often are computed by a replay of the same launches (`replay`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import replay, torch_ops
from sampler_kernels.fit import (
    MAX_INPUTS,
    MAX_VECTORS,
    groups,
    is_plain,
    layout_of,
    must_differentiate,
    narrow,
)
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import INPUT, LOAD, PART
from sampler_kernels.operators import formula_op, gram_op, operands
from sampler_kernels.planning import (
    run_both,
    run_formula,
    run_scalars,
    scalar_programs,
    set_values,
)
from sampler_kernels.programs import Formula
from sampler_kernels.reductions import RowGram, Sums, coefficients_of, joined_with, table_of
from sampler_kernels.scalars import RowScalar, extent


def _pairs(count: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The pairs i <= j of `count` vectors, and the position of each (i, j) among them."""
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    places = [[pairs.index((min(i, j), max(i, j))) for j in range(count)] for i in range(count)]
    return pairs, places


_PAIRS = [_pairs(count) for count in range(MAX_VECTORS + 1)]


def settle(
    lins: list[Lin], dtype: torch.dtype = torch.float32, late: Sequence[Any] = ()
) -> list[Tensor]:
    """The values of lazy formulas, [B, ...] each, and then of recorded scalars, with all pending
    reductions, in as few launches as their inputs allow.
    """
    nodes: list[RowScalar] = []
    for leaf in late:
        nodes += leaf.nodes if isinstance(leaf, RowGram) else [leaf]
    if replay.is_possible():
        values = replay.settle(lins, nodes, dtype, partial(_compute, lins, nodes, dtype))
    else:
        values = _compute(lins, nodes, dtype)
    return [*values, *[leaf.tensor() for leaf in late]]


def gram(lins: list[Lin], axes: tuple[int, ...] | None) -> Any:
    """G[i, j] = <V_i, V_j> per row: `RowGram`, or a tensor where it has to be differentiable."""
    like = lins[0].like
    shape: tuple[int, ...] = like.shape
    rows, kept, trailing = shape[0], (shape[0],), True
    if axes is not None:
        rows, kept = math.prod(shape[: axes[0]]), (*shape[: axes[0]], *(1,) * len(axes))
        trailing = axes == tuple(range(axes[0], len(shape)))
    if len(lins) > MAX_VECTORS or not trailing:
        return torch_ops.gram(lins, axes)
    pairs, places = _PAIRS[len(lins)]
    possible, formula = replay.is_possible(), None
    if not (possible and replay.is_reducible(lins, axes)):
        formula = Formula(lins)
        layout = layout_of(formula)
        if not layout.computable:
            return torch_ops.gram(lins, axes)
        if layout.rows > rows or len(formula.tensors) > MAX_INPUTS:
            lins = [Lin.of(value) for value in settle(lins)]
            formula = Formula(lins)
        elif possible and layout.plain:
            replay.note_reducible(lins, axes)
        if must_differentiate(formula):
            ends = [formula.outs[k] for pair in pairs for k in pair]
            sums = gram_op(*operands(formula, rows), ends)
            cells = torch.stack([torch.stack([sums[p] for p in line]) for line in places])
            return cells.view(len(lins), len(lins), *kept)
    sums, common = Sums(lins, pairs, rows, formula), extent(kept, like.device)
    known = [RowScalar(PART, (sums, p), common) for p in range(len(pairs))]
    return RowGram([[known[p] for p in line] for line in places])


def recorded(value: Tensor) -> Any:
    """A float32 tensor [B] whose arithmetic is recorded, unless torch has to see it."""
    if not is_plain(value):
        return value
    return RowScalar(INPUT, (value,), extent(tuple(value.shape), value.device))


def _compute(lins: list[Lin], nodes: Sequence[RowScalar], dtype: torch.dtype) -> list[Tensor]:
    """The values of formulas; the scalars get theirs."""
    programs = scalar_programs(nodes)
    waiting = dict.fromkeys([p for _, program in programs for p in program.parts])
    left = dict.fromkeys([lin for lin in lins if lin.op != LOAD or lin.a.dtype != dtype])
    values: list[Tensor] = []
    if left:
        formula = Formula(left)
        if layout_of(formula).shares_launch:
            values = _launch_formula(formula, dtype, list(waiting))
        else:
            values = _settle_apart(list(left), dtype, list(waiting))
    for mine, program in programs:
        set_values(mine, run_scalars(program))
    done = dict(zip(left, values, strict=True))
    return [done[lin] if lin in done else lin.a for lin in lins]


def _settle_apart(lins: list[Lin], dtype: torch.dtype, waiting: Sequence[Sums]) -> list[Tensor]:
    """The values of formulas that do not all share a launch."""
    done: dict[int, Tensor] = {}
    left: list[Lin] = []
    for lin in lins:
        if layout_of(Formula([lin])).computable:
            left.append(lin)
        else:
            done[id(lin)] = torch_ops.settle([lin])[0].to(dtype)

    def compute(part: Lin) -> Tensor:
        return _compute([part], (), torch.float32)[0]

    for group in groups(left):
        cut = Formula([narrow(lin, compute) for lin in group])
        for lin, value in zip(group, _launch_formula(cut, dtype, waiting), strict=True):
            done[id(lin)] = value
    return [done[id(lin)] for lin in lins]


def _launch_formula(formula: Formula, dtype: torch.dtype, waiting: Sequence[Sums]) -> list[Tensor]:
    rows = layout_of(formula).rows
    if must_differentiate(formula):
        flat, shape = formula_op(*operands(formula, rows), formula.outs), formula.tensors[0].shape
        return [y.view(shape).to(dtype) for y in flat]
    count = len(formula.outs)
    scalars = coefficients_of(formula, rows)
    joined = joined_with(waiting, formula, scalars, rows) if waiting else []
    if not joined:
        return run_formula(formula, table_of(scalars), rows, dtype)
    for sums in joined:
        formula.extend(sums.lins)
    if len(formula.coefficients) > len(scalars.outs):
        scalars = coefficients_of(formula, rows)
    table = table_of(scalars)
    pairs: list[tuple[int, int]] = []
    first = count
    for sums in joined:
        pairs += [(first + i, first + j) for i, j in sums.pairs]
        first += len(sums.lins)
    outs, parts = run_both(formula, count, pairs, table, rows, dtype)
    first = 0
    for sums in joined:
        sums.value = parts[first : first + len(sums.pairs)] if len(joined) > 1 else parts
        first += len(sums.pairs)
    return outs
