"""The operators that torch sees where it has to: for autograd, and while it compiles.

Two `torch.library` custom operators, differentiable any number of times: their derivatives are
formulas and inner products again (`derivatives`), so the backward pass runs on the same kernels,
and double backward is the backward of those. In float64 they run on the reference, for gradcheck.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import torch_ops
from sampler_kernels.derivatives import add, nodes_of, pull_back
from sampler_kernels.fit import torch_table
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import PART
from sampler_kernels.planning import run_formula, run_gram, run_scalars
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.scalars import RowScalar, extent


def operands(formula: Formula, rows: int) -> tuple[list[Tensor], Tensor, list[int], list[float]]:
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
    double = xs[0].dtype == torch.float64
    # Not imported: the backend imports this module.
    ops: Any = torch_ops if double else sys.modules["sampler_kernels.fused"]
    return *pull_back(nodes, adjoints, xs, table, ctx.code, ops), None, ctx.consts and None, None


_operators: Any = (formula_op, gram_op)  # whose methods are not fully annotated
for _operator, _fake, _backward in zip(
    _operators, (_formula_fake, _gram_fake), (_formula_backward, _gram_backward), strict=True
):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
