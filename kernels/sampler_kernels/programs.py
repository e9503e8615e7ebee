"""Formulas as flat programs of integers, which the Triton kernels unroll when they are compiled.

A program holds no numbers and no tensors, only their positions, so that the steps of a run share
it. The operation codes are those of `opcodes`. Each class walks what it records once; everything
else about a launch is derived from the program and cached by it (`triton_ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from sampler_kernels.counting import record
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import (
    CONST,
    DIV_CONST,
    FILL,
    FIRST,
    INPUT,
    LOAD,
    MUL_CONST,
    PART,
    SQRT,
    SUB,
    WHERE,
)
from sampler_kernels.scalars import RowScalar, computed


class Formula:
    """Lazy values over the same tensors: node i is `code[3i : 3i + 3]` = (operation, a, b).

    LOAD and FIRST read tensors[a]; FILL consts[a]; ADD and SUB nodes a, b; MUL_CONST and DIV_CONST
    node a, consts[b]; MUL_TABLE and DIV_TABLE node a, coefficients[b]. `outs` are the nodes of the
    recorded values, `leaves` a leaf of each tensor, `layout` what `fit` has found out.
    """

    def __init__(self, lins: Iterable[Lin] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.leaves: list[Lin] = []
        self.coefficients: list[Any] = []
        self.consts: list[float] = []
        self.code: list[int] = []
        self.outs: list[int] = []
        self.layout: Any = None
        self._places: dict[Any, int] = {}
        self.extend(lins)

    @staticmethod
    def from_program(
        tensors: Sequence[Tensor], code: Sequence[int], consts: Sequence[float], outs: Sequence[int]
    ) -> Formula:
        """A formula whose program is known; its coefficients are the rows of a table."""
        self = Formula()
        self.tensors, self.code = list(tensors), list(code)
        self.leaves = [Lin(LOAD, x) for x in tensors]
        self.consts, self.outs = list(consts), list(outs)
        return self

    def extend(self, lins: Iterable[Lin]) -> None:
        """Record further outputs; nodes that are recorded already are not walked again."""
        for lin in lins:
            self.outs.append(self._visit(lin, self._places, self.code))
        self.layout = None

    def _visit(self, node: Lin, places: dict[Any, int], code: list[int]) -> int:
        """The position of a node. A method, since a closure that calls itself would keep the
        tensors alive until the garbage collector runs."""
        place = places.get(id(node))
        if place is not None:
            return place
        op = node.op
        if op <= FIRST:  # LOAD or FIRST; two leaves of one tensor are loaded once
            key = (op, id(node.a))
            place = places.get(key)
            if place is not None:
                places[id(node)] = place
                return place
            places[key] = len(code) // 3
            a, b = self._tensor(node), 0
        elif op == FILL:
            a, b = len(self.consts), 0
            self.consts.append(node.b)
        else:
            a = self._visit(node.a, places, code)
            if op <= SUB:  # ADD or SUB
                b = self._visit(node.b, places, code)
            elif op == MUL_CONST or op == DIV_CONST:
                b = len(self.consts)
                self.consts.append(node.b)
            else:
                b = self._coefficient(node.b)
        place = places[id(node)] = len(code) // 3
        code += (op, a, b)
        return place

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors, contiguous. A copy is kept by its leaf, for the other passes of a step."""
        found: list[Tensor] = []
        for leaf in self.leaves:
            x = leaf.a if leaf.b is None else leaf.b
            if not x.is_contiguous():
                x = leaf.b = x.contiguous()
                size = x.numel() * x.element_size()
                record("copy", size, size)
            found.append(x)
        return tuple(found)

    def _tensor(self, leaf: Lin) -> int:
        key = ("tensor", id(leaf.a))
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.tensors)
            self.tensors.append(leaf.a)
            self.leaves.append(leaf)
        return place

    def _coefficient(self, scalar: Any) -> int:
        key = ("scalar", id(scalar))
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self.coefficients)
            self.coefficients.append(scalar)
        return place


class ScalarProgram:
    """Recorded scalars of `rows` rows: node i is `code[4i : 4i + 4]` = (operation, a, b, c).

    PART: pair b of parts[a], c rows share one value; INPUT: inputs[a], likewise; CONST: consts[a];
    other operations: nodes.
    """

    def __init__(self, nodes: Sequence[RowScalar], rows: int) -> None:
        self.rows = rows
        self.parts: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.consts: list[float] = []
        self.code: list[int] = []
        self._places: dict[Any, int] = {}
        self.outs = [self._visit(node, self._places, self.code) for node in nodes]

    def _visit(self, node: Any, places: dict[Any, int], code: list[int]) -> int:
        """The position of a node; a node that two scalars share is computed once."""
        if type(node) is float:
            code += (CONST, len(self.consts), 0, 0)
            self.consts.append(node)
            return len(code) // 4 - 1
        place = places.get(id(node))
        if place is not None:
            return place
        op = node.op
        if node.value is not None or op == INPUT:
            emitted = self._input(node)
        elif op == PART:
            place = places[id(node)] = self._part(node)
            return place
        else:
            args = node.args
            a = self._visit(args[0], places, code)
            if op == SQRT:
                emitted = (op, a, 0, 0)
            else:
                b = self._visit(args[1], places, code)
                emitted = (op, a, b, self._visit(args[2], places, code) if op == WHERE else 0)
        place = places[id(node)] = len(code) // 4
        code += emitted
        return place

    def _input(self, node: RowScalar) -> tuple[int, int, int, int]:
        value = node.args[0] if node.value is None else node.value
        self.inputs.append(value.float().contiguous())
        return INPUT, len(self.inputs) - 1, 0, self.rows // node.rows

    def _part(self, node: RowScalar) -> int:
        sums, pair = node.args
        place = self._places.get((id(sums), pair))
        if place is None:
            part = self._places.get(("part", id(sums)))
            if part is None:
                part = self._places["part", id(sums)] = len(self.parts)
                self.parts.append(computed(sums))
            place = self._places[id(sums), pair] = len(self.code) // 4
            self.code.extend((PART, part, pair, self.rows // node.rows))
        return place
