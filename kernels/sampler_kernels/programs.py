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
    SUB,
)
from sampler_kernels.scalars import RowScalar


class Formula:
    """Lazy values over the same tensors, as `code`: node i is code[3i : 3i + 3], (operation, a, b).

    LOAD and FIRST read tensors[a]; FILL consts[a]; ADD and SUB nodes a, b; MUL_CONST and DIV_CONST
    node a, consts[b]; MUL_TABLE and DIV_TABLE node a, coefficients[b]. `outs` are the nodes of the
    recorded values, `numbers` the nodes that the consts are of, `leaves` a leaf of each tensor,
    `layout` what `fit` has found out.
    """

    __slots__ = (
        "_places",
        "code",
        "coefficients",
        "consts",
        "layout",
        "leaves",
        "numbers",
        "outs",
        "tensors",
    )

    def __init__(self, lins: Iterable[Lin] = ()) -> None:
        self.tensors: list[Tensor] = []
        self.leaves: list[Lin] = []
        self.coefficients: list[Any] = []
        self.consts: list[float] = []
        self.numbers: list[Lin] = []
        self.code: list[int] = []
        self.outs: list[int] = []
        self.layout: Any = None
        self._places: dict[Any, int] = {}  # of nodes; of LOAD by id of its tensor, of FIRST by ~id
        self.extend(lins)

    @staticmethod
    def from_program(
        tensors: Sequence[Tensor], code: Sequence[int], consts: Sequence[float], outs: Sequence[int]
    ) -> Formula:
        """A formula whose program is known; its coefficients are the rows of a table."""
        self = Formula()
        self.tensors = list(tensors)
        self.leaves = [Lin(LOAD, x) for x in tensors]
        self.code, self.consts, self.outs = list(code), list(consts), list(outs)
        return self

    def extend(self, lins: Iterable[Lin]) -> None:
        """Record outputs, further ones over the same tensors; nodes that are recorded already are
        not walked again.
        """
        places, code = self._places, self.code
        for lin in lins:
            place = places.get(lin)
            self.outs.append(self._visit(lin, places, code) if place is None else place)

    def _visit(self, node: Lin, places: dict[Any, int], code: list[int]) -> int:
        """Record a node that has no place yet.

        A method, since a closure that calls itself would keep the tensors alive until the garbage
        collector runs. Nodes that have a place are not visited, which saves their calls.
        """
        op, a, b = node.op, node.a, node.b
        if op <= FIRST:
            place = places[node] = self._visit_leaf(node, places, code)
            return place
        if op == FILL:
            a, b = self._number(node), 0
        else:
            place = places.get(a)
            a = self._visit(a, places, code) if place is None else place
            if op <= SUB:  # ADD or SUB
                place = places.get(b)
                b = self._visit(b, places, code) if place is None else place
            elif op == MUL_CONST or op == DIV_CONST:
                b = self._number(node)
            else:
                b = self._coefficient(b)
        place = places[node] = len(code) // 3
        code += op, a, b
        return place

    def _visit_leaf(self, leaf: Lin, places: dict[Any, int], code: list[int]) -> int:
        """Record a leaf; two leaves of one tensor are loaded once."""
        x, op = leaf.a, leaf.op
        key = id(x) if op == LOAD else ~id(x)
        place = places.get(key)
        if place is None:
            other = places.get(~key)
            if other is None:
                index = len(self.tensors)
                self.tensors.append(x)
                self.leaves.append(leaf)
            else:
                index = code[3 * other + 1]
            place = places[key] = len(code) // 3
            code += op, index, 0
        return place

    def _number(self, node: Lin) -> int:
        self.numbers.append(node)
        self.consts.append(node.b)
        return len(self.consts) - 1

    def _coefficient(self, scalar: Any) -> int:
        for index, known in enumerate(self.coefficients):
            if known is scalar:
                return index
        self.coefficients.append(scalar)
        return len(self.coefficients) - 1

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


class ScalarProgram:
    """Recorded scalars as `code`: node i is code[4i : 4i + 4], (operation, a, b, c).

    PART: pair b of the reduction parts[a], c rows share one value; INPUT: inputs[a], likewise;
    CONST: consts[a]; other operations: nodes. `rows` is a multiple of every scalar's rows;
    `numbers` are the nodes that the consts are arguments of, one after the other.
    """

    __slots__ = (
        "_places",
        "code",
        "consts",
        "device",
        "inputs",
        "numbers",
        "outs",
        "parts",
        "rows",
    )

    def __init__(self, scalars: Sequence[RowScalar], rows: int) -> None:
        self.rows = rows
        self.device: Any = scalars[0].extent.device if scalars else None
        self.parts: list[Any] = []
        self.inputs: list[Tensor] = []
        self.consts: list[float] = []
        self.numbers: list[RowScalar] = []
        self.code: list[int] = []
        self._places: dict[Any, int] = {}  # of nodes; of reductions among the parts
        self.outs: list[int] = []
        places, code = self._places, self.code
        for scalar in scalars:
            place = places.get(scalar)
            self.outs.append(self._visit(scalar, places, code) if place is None else place)

    def _visit(self, node: RowScalar, places: dict[Any, int], code: list[int]) -> int:
        """Record a node that has no place yet; one that two scalars share is computed once."""
        op, value = node.op, node.value
        if op == INPUT or value is not None:
            found = INPUT, len(self.inputs), 0, self.rows // node.extent.rows
            self.inputs.append(node.args[0] if value is None else value)
        elif op == PART:
            sums, pair = node.args
            part = places.get(sums)
            if part is None:
                part = places[sums] = len(self.parts)
                self.parts.append(sums)
            found = PART, part, pair, self.rows // node.extent.rows
        else:
            found = [op]
            for operand in node.args:
                if type(operand) is float:
                    found.append(len(code) // 4)
                    code += CONST, len(self.consts), 0, 0
                    self.consts.append(operand)
                    self.numbers.append(node)
                else:
                    place = places.get(operand)
                    found.append(self._visit(operand, places, code) if place is None else place)
            found += _PADDING[len(found)]
        place = places[node] = len(code) // 4
        code += found
        return place


_PADDING = ((), (0, 0, 0), (0, 0), (0,), ())
