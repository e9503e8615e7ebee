"""The derivatives of formulas, which are formulas and inner products themselves.

Y = formula(X; s)        dX_k, ds: the adjoints of Y's formula
G_p = <V_i, V_j>         dV_i = G'_p·V_j, dV_j = G'_p·V_i, and on through the formulas of V
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sampler_kernels.deferred import computed
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import (
    ADD,
    DIV_CONST,
    DIV_TABLE,
    FILL,
    FIRST,
    LOAD,
    MUL_CONST,
    MUL_TABLE,
    SUB,
)


class Operations(Protocol):
    """A backend: the module `torch_ops` or `fused`."""

    def settle(self, lins: list[Lin], /) -> list[Tensor]: ...
    def gram(self, lins: list[Lin], axes: tuple[int, ...] | None, /) -> Any: ...


def nodes_of(
    xs: Sequence[Tensor], table: Tensor, code: Sequence[int], consts: Sequence[float]
) -> list[Lin]:
    """A formula's program as lazy values; node i is `code[3i : 3i + 3]`."""
    nodes: list[Lin] = []
    for i in range(0, len(code), 3):
        op, a, b = code[i : i + 3]
        if op in (LOAD, FIRST):
            nodes.append(Lin(op, xs[a]))
        elif op == FILL:
            nodes.append(Lin(op, xs[0], consts[a]))
        elif op in (ADD, SUB):
            nodes.append(Lin(op, nodes[a], nodes[b]))
        else:
            nodes.append(Lin(op, nodes[a], consts[b] if op in (MUL_CONST, DIV_CONST) else table[b]))
    return nodes


def add(adjoints: dict[int, Lin], place: int, term: Lin) -> None:
    """Add a term to the adjoint of a node."""
    adjoints[place] = term if place not in adjoints else adjoints[place] + term


def pull_back(
    nodes: list[Lin],
    adjoints: dict[int, Lin],
    xs: Sequence[Tensor],
    table: Tensor,
    code: Sequence[int],
    ops: Operations,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of xs [R, n] and of the table [C, R], from the adjoints of some nodes."""
    of_x: dict[int, Lin] = {}
    of_table: dict[int, Any] = {}
    for i in reversed(range(len(nodes))):
        op, a, b = code[3 * i : 3 * i + 3]
        bar = adjoints.pop(i, None)
        if bar is None or op in (FILL, FIRST):
            continue
        if op == LOAD:
            add(of_x, a, bar)
        elif op in (ADD, SUB):
            add(adjoints, a, bar)
            add(adjoints, b, bar if op == ADD else -bar)
        else:
            scalar = nodes[i].b
            multiply = op in (MUL_CONST, MUL_TABLE)
            add(adjoints, a, bar * scalar if multiply else bar / scalar)
            if op in (MUL_TABLE, DIV_TABLE) and table.requires_grad:
                inner = ops.gram([bar, nodes[a if multiply else i]], None)[0, 1]
                term = inner if multiply else -inner / scalar
                of_table[b] = term if b not in of_table else of_table[b] + term
    found = ops.settle(list(of_x.values()))
    by_x = {k: y.to(xs[k].dtype) for k, y in zip(of_x, found, strict=True)}
    zero = torch.zeros_like(table[0]) if len(table) else table
    lines = [torch.as_tensor(computed(of_table.get(c, zero))) for c in range(len(table))]
    return (
        [by_x[k] if k in by_x else torch.zeros_like(x) for k, x in enumerate(xs)],
        torch.stack(lines).to(table.dtype) if lines else torch.zeros_like(table),
    )
