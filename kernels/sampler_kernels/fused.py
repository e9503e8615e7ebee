"""The Triton backend.

Left to the reference, which computes every formula: float64, tensors of different devices or
shapes, coefficients that vary over other than the leading dimensions, gram over other than the
trailing ones, and more than 4 gram vectors.

Where torch has to see an operation (autograd, torch.compile), it is one of two `torch.library`
custom operators, differentiable any number of times: their derivatives are formulas and inner
products again (`derivatives`), so the backward pass runs on the same kernels, and double backward
is the backward of those. In float64 the operators run on the reference, for gradcheck.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import torch_ops
from sampler_kernels.derivatives import add, nodes_of, pull_back
from sampler_kernels.fit import (
    MAX_INPUTS,
    MAX_VECTORS,
    groups,
    is_plain,
    layout_of,
    must_differentiate,
    narrow,
    torch_table,
)
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import LOAD, PART
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.reductions import Sums, coefficients_of, joined_with, table_of
from sampler_kernels.scalars import RowGram, RowScalar, extent
from sampler_kernels.triton_ops import (
    run_both,
    run_formula,
    run_gram,
    run_scalars,
    scalar_programs,
    set_values,
)


def _pairs(count: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The pairs i <= j of `count` vectors, and the position of each (i, j) among them."""
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    places = [[pairs.index((min(i, j), max(i, j))) for j in range(count)] for i in range(count)]
    return pairs, places


_PAIRS = [_pairs(count) for count in range(MAX_VECTORS + 1)]


def settle(
    lins: list[Lin], dtype: torch.dtype = torch.float32, waiting: Sequence[Sums] = ()
) -> list[Tensor]:
    """The values of lazy formulas, [B, ...] each, in as few launches as their inputs allow.

    waiting: reductions to compute in the same passes, where they fit.
    """
    left = dict.fromkeys([lin for lin in lins if lin.op != LOAD or lin.a.dtype != dtype])
    if not left:
        return [lin.a for lin in lins]
    formula = Formula(left)
    if layout_of(formula).shares_launch:
        values = _launch_formula(formula, dtype, waiting)
    else:
        values = _settle_apart(list(left), dtype, waiting)
    done = dict(zip(left, values, strict=True))
    return [done[lin] if lin in done else lin.a for lin in lins]


def finish(lins: list[Lin], late: list[Any]) -> list[Tensor]:
    """The values of lazy formulas and of recorded scalars, with all pending reductions."""
    nodes: list[RowScalar] = []
    for leaf in late:
        nodes += leaf.nodes if isinstance(leaf, RowGram) else [leaf]
    programs = scalar_programs(nodes)
    waiting = dict.fromkeys([p for _, program in programs for p in program.parts])
    values = settle(lins, waiting=list(waiting))
    for mine, program in programs:
        set_values(mine, program)
    return [*values, *(leaf.tensor() for leaf in late)]


def gram(lins: list[Lin], axes: tuple[int, ...] | None) -> Any:
    """G[i, j] = <V_i, V_j> per row: `RowGram`, or a tensor where it has to be differentiable."""
    shape = tuple(lins[0].like.shape)
    rows, kept, trailing = shape[0], shape[:1], True
    if axes is not None:
        rows, kept = math.prod(shape[: axes[0]]), (*shape[: axes[0]], *(1,) * len(axes))
        trailing = axes == tuple(range(axes[0], len(shape)))
    if len(lins) > MAX_VECTORS or not trailing:
        return torch_ops.gram(lins, axes)
    formula = Formula(lins)
    layout = layout_of(formula)
    if not layout.computable:
        return torch_ops.gram(lins, axes)
    if layout.rows > rows or len(formula.tensors) > MAX_INPUTS:
        lins = [Lin.of(value) for value in settle(lins)]
        formula = Formula(lins)
    pairs, places = _PAIRS[len(lins)]
    if must_differentiate(formula):
        ends = [formula.outs[k] for pair in pairs for k in pair]
        sums = gram_op(*_operands(formula, rows), ends)
        cells = torch.stack([torch.stack([sums[p] for p in line]) for line in places])
        return cells.view(len(lins), len(lins), *kept)
    sums, common = Sums(formula, lins, pairs, rows), extent(kept, formula.tensors[0].device)
    known = [RowScalar(PART, (sums, p), common) for p in range(len(pairs))]
    return RowGram([[known[p] for p in line] for line in places])


def recorded(value: Tensor) -> Any:
    """A float32 tensor [B] whose arithmetic is recorded, unless torch has to see it."""
    if not is_plain(value):
        return value
    return RowScalar.of(value, extent(tuple(value.shape), value.device))


def _settle_apart(lins: list[Lin], dtype: torch.dtype, waiting: Sequence[Sums]) -> list[Tensor]:
    """The values of formulas that do not all share a launch."""
    done: dict[int, Tensor] = {}
    left: list[Lin] = []
    for lin in lins:
        if layout_of(Formula([lin])).computable:
            left.append(lin)
        else:
            done[id(lin)] = torch_ops.settle([lin])[0].to(dtype)
    for group in groups(left):
        cut = Formula([narrow(lin, lambda part: settle([part])[0]) for lin in group])
        for lin, value in zip(group, _launch_formula(cut, dtype, waiting), strict=True):
            done[id(lin)] = value
    return [done[id(lin)] for lin in lins]


def _launch_formula(formula: Formula, dtype: torch.dtype, waiting: Sequence[Sums]) -> list[Tensor]:
    rows = layout_of(formula).rows
    if must_differentiate(formula):
        flat, shape = formula_op(*_operands(formula, rows), formula.outs), formula.tensors[0].shape
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


def _operands(formula: Formula, rows: int) -> tuple[list[Tensor], Tensor, list[int], list[float]]:
    """The operands that both operators share: xs [R, n], table [C, R], code, consts."""
    xs = [x.reshape(rows, -1) for x in formula.tensors]
    table = torch_table(formula.coefficients, rows)
    if table is None:
        table = xs[0].new_empty((0, rows), dtype=torch.float32)
    return xs, table, formula.code, formula.consts


@torch.library.custom_op("sampler_kernels::formula", mutates_args=())
def formula_op(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], outs: list[int]
) -> list[Tensor]:
    """Outputs [R, n] of a formula over xs, [R, n] each, and coefficients table [C, R]."""
    if xs[0].dtype == torch.float64:
        nodes = nodes_of(xs, table, code, consts)
        # An operator's outputs must not be its inputs.
        return [y.clone() for y in torch_ops.settle([nodes[i] for i in outs])]
    formula = Formula.from_program(xs, code, consts, outs)
    return run_formula(formula, table, xs[0].shape[0], torch.float32)


@torch.library.custom_op("sampler_kernels::gram", mutates_args=())
def gram_op(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], ends: list[int]
) -> Tensor:
    """Inner products [P, R] of nodes (ends[0], ends[1]), (ends[2], ends[3]), ... of a formula."""
    rows = xs[0].shape[0]
    pairs = [(p, p + 1) for p in range(0, len(ends), 2)]
    if xs[0].dtype == torch.float64:
        nodes = nodes_of(xs, table, code, consts)
        return torch.stack([torch_ops.gram([nodes[ends[i]], nodes[ends[j]]], None)[0, 1]
                            for i, j in pairs])  # fmt: skip
    formula = Formula.from_program(xs, code, consts, ends)
    sums = run_gram(formula, pairs, table, rows)
    own = extent((rows,), sums.device)
    scalars = [RowScalar(PART, (sums, p), own) for p in range(len(pairs))]
    return run_scalars(ScalarProgram(scalars, rows))


def _formula_fake(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], outs: list[int]
) -> list[Tensor]:
    return [torch.empty_like(xs[0], dtype=_wide(xs[0])) for _ in outs]


def _gram_fake(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], ends: list[int]
) -> Tensor:
    return xs[0].new_empty((len(ends) // 2, xs[0].shape[0]), dtype=_wide(xs[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    xs, table, ctx.code, ctx.consts, ctx.ends = inputs
    ctx.save_for_backward(*xs, table)


def _formula_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    adjoints: dict[int, Lin] = {}
    for end, grad in zip(ctx.ends, grads, strict=True):
        if grad is not None:
            add(adjoints, end, Lin.of(grad))
    *xs, table = ctx.saved_tensors
    return _gradients(ctx, nodes_of(xs, table, ctx.code, ctx.consts), adjoints)


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, table = ctx.saved_tensors
    nodes = nodes_of(xs, table, ctx.code, ctx.consts)
    adjoints: dict[int, Lin] = {}
    ends: list[int] = ctx.ends
    for p, (i, j) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        add(adjoints, i, nodes[j] * grad[p])
        add(adjoints, j, nodes[i] * grad[p])
    return _gradients(ctx, nodes, adjoints)


def _gradients(ctx: Any, nodes: list[Lin], adjoints: dict[int, Lin]) -> tuple[Any, ...]:
    *xs, table = ctx.saved_tensors
    ops: Any = torch_ops if xs[0].dtype == torch.float64 else sys.modules[__name__]
    return *pull_back(nodes, adjoints, xs, table, ctx.code, ops), None, ctx.consts and None, None


_operators: Any = (formula_op, gram_op)  # whose methods are not fully annotated
for _operator, _fake, _backward in zip(
    _operators, (_formula_fake, _gram_fake), (_formula_backward, _gram_backward), strict=True
):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
