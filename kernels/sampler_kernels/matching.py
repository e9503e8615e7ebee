"""Functions that know lazy values of one structure, and fetch the tensors and numbers in them.

A walk over formulas and scalars asks every node what it is. Where the answer is known beforehand,
from values of the same structure, it need only be checked: a function is generated that reads each
node once and compares, in about a fifth of the time. Compiling it takes some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sampler_kernels.fit import PLAIN
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import DIV_CONST, FILL, FIRST, INPUT, MUL_CONST, PART, SUB
from sampler_kernels.reductions import Sums
from sampler_kernels.scalars import RowScalar

Match = Callable[[Sequence[Lin], Sequence[RowScalar]], "tuple[Any, ...] | None"]


class Structure:
    """The structure of lazy values, and of the tensors in them: type, shape, device.

    places: where the function's answer has each tensor and reduction, by id, and each number, by id
    of its node and position among the node's numbers. reductions: those without a value, and their
    places. complete: it can be checked; tensors of tracers, and those that a launch would have to
    copy, cannot.
    """

    def __init__(self, lins: Sequence[Lin], scalars: Sequence[RowScalar]) -> None:
        self.places: dict[Any, int] = {}
        self.complete = True
        self.reductions: list[tuple[Sums, int]] = []
        self._lines: list[str] = []
        self._answer: list[str] = []
        self._names: dict[int, str] = {}  # of what was met, by id
        self._globals: dict[str, Any] = {"RowScalar": RowScalar, "Sums": Sums}
        for k, lin in enumerate(lins):
            self._lin(lin, f"lins[{k}]")
        for k, scalar in enumerate(scalars):
            self._scalar(scalar, f"scalars[{k}]")

    def function(self) -> Match:
        """Return the function of (lins, scalars): None for another structure, else the answer.

        Fewer values in common make no other structure: they are computed twice, to the same result.
        """
        body = "".join(f"    {line}\n" for line in self._lines)
        source = f"def match(lins, scalars):\n{body}    return ({', '.join(self._answer)},)\n"
        exec(compile(source, "<sampler_kernels.matching>", "exec"), self._globals)
        return self._globals["match"]

    def _lin(self, node: Lin, text: str) -> None:
        name = self._met(node, text)
        if name is None:
            return
        op, b = node.op, node.b
        self._require(f"{name}.op == {op}")
        if op <= FIRST:
            self._tensor(node.a, f"{name}.a")
        elif op == FILL:
            self._give((id(node), 0), f"{name}.b")
        else:
            self._lin(node.a, f"{name}.a")
            if op <= SUB:  # ADD or SUB
                self._lin(b, f"{name}.b")
            elif op == MUL_CONST or op == DIV_CONST:
                self._give((id(node), 0), f"{name}.b")
            elif type(b) is RowScalar:
                self._scalar(b, f"{name}.b")
            else:
                self._tensor(b, f"{name}.b")

    def _scalar(self, node: RowScalar, text: str) -> None:
        name = self._met(node, text)
        if name is None:
            return
        self._require(
            f"type({name}) is RowScalar",
            f"{name}.op == {node.op}",
            f"{name}.extent is {self._constant(node.extent)}",
            f"{name}.truth is {node.truth}",
            f"{name}.value is {'not ' if node.value is not None else ''}None",
        )
        if node.value is not None:
            self._tensor(node.value, f"{name}.value")
            return
        parts = [f"{name}_{k}" for k in range(len(node.args))]  # as many for every node of an op
        self._lines.append(f"{', '.join(parts)}, = {name}.args")
        if node.op == PART:
            self._require(f"{parts[1]} == {node.args[1]}")
            self._sums(node.args[0], parts[0])
        elif node.op == INPUT:
            self._tensor(node.args[0], parts[0])
        else:
            numbers = 0
            for operand, part in zip(node.args, parts, strict=True):
                if type(operand) is float:
                    self._require(f"type({part}) is float")
                    self._give((id(node), numbers), part)
                    numbers += 1
                else:
                    self._scalar(operand, part)

    def _sums(self, sums: Any, text: str) -> None:
        name = self._met(sums, text)
        if name is None:
            return
        if type(sums) is not Sums:  # the partial sums of an operator
            self.complete = False
            return
        pairs = self._constant(sums.pairs)
        self._require(f"type({name}) is Sums", f"{name}.rows == {sums.rows}")
        self._require(f"{name}.pairs is {pairs}")
        self._give(id(sums), name)
        if sums.value is not None:
            self._tensor(sums.value, f"{name}.value")
            return
        self._require(f"{name}.value is None")
        self.reductions.append((sums, self.places[id(sums)]))
        for k, lin in enumerate(sums.lins):  # as many as the pairs are of
            self._lin(lin, f"{name}.lins[{k}]")

    def _tensor(self, x: Tensor, text: str) -> None:
        name = self._met(x, text)
        if name is None:
            return
        self.complete = self.complete and type(x) in PLAIN and x.is_contiguous()
        kind, dtype, shape, device = map(self._constant, (type(x), x.dtype, x.shape, x.device))
        self._require(
            f"type({name}) is {kind}",
            f"{name}.dtype is {dtype}",
            f"{name}.shape == {shape}",
            f"{name}.device == {device}",
            f"{name}.is_contiguous()",
        )
        self._give(id(x), name)

    def _met(self, value: Any, text: str) -> str | None:
        """The name of a value that is met for the first time; None if it must be one known."""
        known = self._names.get(id(value))
        if known is not None:
            self._require(f"{text} is {known}")
            return None
        name = self._names[id(value)] = f"v{len(self._names)}"
        self._lines.append(f"{name} = {text}")
        return name

    def _require(self, *conditions: str) -> None:
        self._lines.append(f"if not ({' and '.join(conditions)}): return None")

    def _give(self, key: Any, text: str) -> None:
        self.places[key] = len(self._answer)
        self._answer.append(text)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._globals)}"
        self._globals[name] = value
        return name
