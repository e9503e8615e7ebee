"""The two operations as `torch.library` custom operators, differentiable any number of times.

    Y = formula(X; s)        dX_k, ds: the adjoints of Y's formula, themselves formulas and grams
    G_p = <V_i, V_j>         dV_i = G'_p·V_j, dV_j = G'_p·V_i, and on through the formulas of V

so the backward pass runs on the same two kernels, and double backward is the backward of those.
With fake implementations, torch.compile sees two opaque operators and no graph break. float64
inputs are computed by the reference, which is how gradcheck can check the formulas here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import torch_ops
from sampler_kernels.deferred import computed
from sampler_kernels.programs import (
    ADD,
    DIV_CONST,
    DIV_TABLE,
    FILL,
    FIRST,
    LOAD,
    MUL_CONST,
    MUL_TABLE,
    SUB,
    Formula,
)
from sampler_kernels.rows import Lin
from sampler_kernels.scalars import PART, RowScalar
from sampler_kernels.triton_ops import run_formula, run_gram, run_scalars


def settle(formula: Formula, table: Tensor | None, rows: int) -> list[Tensor]:
    """The outputs of a formula, in the inputs' shape, float32 (float64 for float64)."""
    like = formula.like
    xs = [x.reshape(rows, -1) for x in formula.tensors]
    table = like.new_empty((0, rows), dtype=torch.float32) if table is None else table
    flat = formula_op(xs, table, formula.code, formula.consts, formula.outs)
    return [y.view(like.shape) for y in flat]


def gram(
    formula: Formula, pairs: Sequence[tuple[int, int]], table: Tensor | None, rows: int
) -> Tensor:
    """The inner products [P, R] of pairs of a formula's outputs."""
    xs = [x.reshape(rows, -1) for x in formula.tensors]
    table = formula.like.new_empty((0, rows), dtype=torch.float32) if table is None else table
    nodes = [formula.outs[k] for pair in pairs for k in pair]
    return gram_op(xs, table, formula.code, formula.consts, nodes)


@torch.library.custom_op("sampler_kernels::formula", mutates_args=())
def formula_op(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], outs: list[int]
) -> list[Tensor]:
    """Outputs [R, n] of a formula over xs, [R, n] each, and coefficients table [C, R]."""
    if xs[0].dtype == torch.float64:
        nodes = _nodes(xs, table, code, consts)
        # An operator's outputs must not be its inputs.
        return [y.clone() for y in torch_ops.settle([nodes[i] for i in outs])]
    formula = Formula(list(xs), [], list(consts), list(code), list(outs))
    return run_formula(formula, table, xs[0].shape[0], torch.float32)


@torch.library.custom_op("sampler_kernels::gram", mutates_args=())
def gram_op(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], ends: list[int]
) -> Tensor:
    """Inner products [P, R] of nodes (ends[0], ends[1]), (ends[2], ends[3]), ... of a formula."""
    rows = xs[0].shape[0]
    pairs = [(p, p + 1) for p in range(0, len(ends), 2)]
    if xs[0].dtype == torch.float64:
        nodes = _nodes(xs, table, code, consts)
        return torch.stack([torch_ops.gram([nodes[ends[i]], nodes[ends[j]]], None)[0, 1]
                            for i, j in pairs])  # fmt: skip
    formula = Formula(list(xs), [], list(consts), list(code), list(ends))
    sums = run_gram(formula, pairs, table, rows)
    return run_scalars(
        [RowScalar(PART, (sums, p), (rows,), sums.device, False) for p in range(len(pairs))], rows
    )


@formula_op.register_fake
def _(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], outs: list[int]
) -> list[Tensor]:
    return [torch.empty_like(xs[0], dtype=_wide(xs[0])) for _ in outs]


@gram_op.register_fake
def _(
    xs: list[Tensor], table: Tensor, code: list[int], consts: list[float], ends: list[int]
) -> Tensor:
    return xs[0].new_empty((len(ends) // 2, xs[0].shape[0]), dtype=_wide(xs[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    xs, table, ctx.code, ctx.consts, ctx.ends = inputs
    ctx.save_for_backward(*xs, table)


def _formula_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *xs, table = ctx.saved_tensors
    nodes = _nodes(xs, table, ctx.code, ctx.consts)
    adjoints: dict[int, Lin] = {}
    for end, grad in zip(ctx.ends, grads, strict=True):
        if grad is not None:
            _add(adjoints, end, Lin.of(grad))
    return *_pulled_back(nodes, adjoints, xs, table, ctx.code), None, ctx.consts and None, None


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *xs, table = ctx.saved_tensors
    nodes = _nodes(xs, table, ctx.code, ctx.consts)
    adjoints: dict[int, Lin] = {}
    for p, (i, j) in enumerate(zip(ctx.ends[::2], ctx.ends[1::2], strict=True)):
        _add(adjoints, i, nodes[j] * grad[p])
        _add(adjoints, j, nodes[i] * grad[p])
    return *_pulled_back(nodes, adjoints, xs, table, ctx.code), None, ctx.consts and None, None


formula_op.register_autograd(_formula_backward, setup_context=_setup)
gram_op.register_autograd(_gram_backward, setup_context=_setup)


def _pulled_back(
    nodes: list[Lin], adjoints: dict[int, Lin], xs: list[Tensor], table: Tensor, code: list[int]
) -> tuple[list[Tensor], Tensor]:
    """The gradients of xs and of the table, from the adjoints of some nodes."""
    ops = _backend(xs[0])
    of_x: dict[int, Lin] = {}
    of_table: dict[int, Tensor] = {}
    for i in reversed(range(len(nodes))):
        op, a, b = code[3 * i : 3 * i + 3]
        bar = adjoints.pop(i, None)
        if bar is None or op in (FILL, FIRST):
            continue
        if op == LOAD:
            _add(of_x, a, bar)
        elif op in (ADD, SUB):
            _add(adjoints, a, bar)
            _add(adjoints, b, bar if op == ADD else -bar)
        else:
            scalar = nodes[i].b
            multiply = op in (MUL_CONST, MUL_TABLE)
            _add(adjoints, a, bar * scalar if multiply else bar / scalar)
            if op in (MUL_TABLE, DIV_TABLE) and table.requires_grad:
                inner = ops.gram([bar, nodes[a if multiply else i]], None)[0, 1]
                share = inner if multiply else -inner / scalar
                of_table[b] = share if b not in of_table else of_table[b] + share
    found = ops.settle(list(of_x.values()))
    by_x = {k: y.to(xs[k].dtype) for k, y in zip(of_x, found, strict=True)}
    zero = torch.zeros_like(table[0]) if len(table) else table
    lines = [torch.as_tensor(computed(of_table.get(c, zero))) for c in range(len(table))]
    return (
        [by_x[k] if k in by_x else torch.zeros_like(x) for k, x in enumerate(xs)],
        torch.stack(lines).to(table.dtype) if lines else torch.zeros_like(table),
    )


def _nodes(xs: list[Tensor], table: Tensor, code: list[int], consts: list[float]) -> list[Lin]:
    """A formula's program as lazy values again; node i stands for `code[3i : 3i + 3]`."""
    nodes: list[Lin] = []
    for i in range(0, len(code), 3):
        op, a, b = code[i : i + 3]
        if op == LOAD:
            nodes.append(Lin("leaf", xs[a]))
        elif op == FIRST:
            nodes.append(Lin("first", xs[a]))
        elif op == FILL:
            nodes.append(Lin("ones", xs[0]) if consts[a] else Lin("zero", xs[0]))
        elif op in (ADD, SUB):
            nodes.append(Lin("add" if op == ADD else "sub", nodes[a], nodes[b]))
        else:
            scalar = consts[b] if op in (MUL_CONST, DIV_CONST) else table[b]
            nodes.append(Lin("mul" if op in (MUL_CONST, MUL_TABLE) else "div", nodes[a], scalar))
    return nodes


def _add(adjoints: dict[int, Lin], place: int, share: Lin) -> None:
    adjoints[place] = share if place not in adjoints else adjoints[place] + share


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backend(x: Tensor) -> ModuleType:
    from sampler_kernels import fused

    return torch_ops if x.dtype == torch.float64 else fused
