"""Formulas as flat programs of integers, which the Triton kernels unroll when they are compiled.

A program holds no numbers and no tensors, only their positions, so that the steps of a run share
it. The operation codes are those of `opcodes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import (
    ADD,
    CONST,
    DIV_CONST,
    FILL,
    FIRST,
    INPUT,
    LOAD,
    MUL_CONST,
    PART,
    SUB,
)
from sampler_kernels.scalars import RowScalar, computed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Formula:
    """Lazy values over the same tensors: node i is `code[3i : 3i + 3]` = (operation, a, b).

    LOAD and FIRST read tensors[a]; FILL consts[a]; ADD and SUB nodes a, b; MUL_CONST and DIV_CONST
    node a, consts[b]; MUL_TABLE and DIV_TABLE node a, coefficients[b].
    """

    tensors: list[Tensor] = field(default_factory=list)
    coefficients: list[Any] = field(default_factory=list)
    consts: list[float] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    outs: list[int] = field(default_factory=list)

    @property
    def like(self) -> Tensor:
        return self.tensors[0]

    @staticmethod
    def of(lins: Sequence[Lin]) -> Formula:
        self, places = Formula(), {}
        for lin in lins:
            self.outs.append(_visit(lin, places, lambda n, go: self._node(n, go, places)))
        return self

    def _node(self, node: Lin, go: Callable[[Any], int], places: dict[Any, int]) -> int:
        op = node.op
        if op in (LOAD, FIRST):
            # Two leaves of one tensor are loaded once.
            key, tensor = (op, id(node.a)), ("tensor", id(node.a))
            if tensor not in places:
                places[tensor] = _append(self.tensors, node.a)
            if key not in places:
                places[key] = self._emit(op, places[tensor])
            return places[key]
        if op == FILL:
            return self._emit(FILL, _append(self.consts, node.b))
        a = go(node.a)
        if op in (ADD, SUB):
            return self._emit(op, a, go(node.b))
        if op in (MUL_CONST, DIV_CONST):
            return self._emit(op, a, _append(self.consts, node.b))
        if ("scalar", id(node.b)) not in places:
            places["scalar", id(node.b)] = _append(self.coefficients, node.b)
        return self._emit(op, a, places["scalar", id(node.b)])

    def _emit(self, op: int, a: int, b: int = 0) -> int:
        self.code += (op, a, b)
        return len(self.code) // 3 - 1


@dataclass(eq=False)
class ScalarProgram:
    """Recorded scalars of `rows` rows: node i is `code[4i : 4i + 4]` = (operation, a, b, c).

    PART: pair b of parts[a], c rows share one value; INPUT: inputs[a], likewise; CONST: consts[a];
    other operations: nodes.
    """

    rows: int
    parts: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    consts: list[float] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    outs: list[int] = field(default_factory=list)

    @staticmethod
    def of(nodes: Sequence[RowScalar], rows: int) -> ScalarProgram:
        self, places = ScalarProgram(rows), {}
        for node in nodes:
            self.outs.append(_visit(node, places, lambda n, go: self._node(n, go, places)))
        return self

    def _node(self, node: Any, go: Callable[[Any], int], places: dict[Any, int]) -> int:
        if isinstance(node, float):
            return self._emit(CONST, _append(self.consts, node))
        if node.value is not None or node.op == INPUT:
            value = (node.args[0] if node.value is None else node.value).float().contiguous()
            return self._emit(INPUT, _append(self.inputs, value), 0, self.rows // node.rows)
        if node.op == PART:
            sums, pair = node.args
            if ("part", id(sums)) not in places:
                places["part", id(sums)] = _append(self.parts, computed(sums))
            key = ("pair", id(sums), pair)
            if key not in places:
                places[key] = self._emit(
                    PART, places["part", id(sums)], pair, self.rows // node.rows
                )
            return places[key]
        return self._emit(node.op, *(go(arg) for arg in node.args))

    def _emit(self, op: int, a: int, b: int = 0, c: int = 0) -> int:
        self.code += (op, a, b, c)
        return len(self.code) // 4 - 1


def _visit(node: Any, places: dict[Any, int], emit: Callable[..., int]) -> int:
    """The place of a node; a node that two formulas share is computed once."""
    if isinstance(node, float):
        return emit(node, None)
    if id(node) not in places:
        places[id(node)] = emit(node, lambda other: _visit(other, places, emit))
    return places[id(node)]


def _append(items: list[Any], item: Any) -> int:
    items.append(item)
    return len(items) - 1
