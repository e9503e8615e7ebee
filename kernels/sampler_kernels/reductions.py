"""Deferred inner products: computed when a number of them is needed, or in a later shared pass.

A rule may reduce what only its next step reads (the cosine of adaptive guidance). Then the
reduction has no launch of its own: `fused.settle` computes it in the pass of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels.deferred import Deferred
from sampler_kernels.lin import Lin
from sampler_kernels.planning import run_gram, run_scalars
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.scalars import RowScalar, extent

# Products that one pass sums, each in its own registers.
MAX_PAIRS = 8

# Annotated, so that what is tested against it stays of type Any.
_TUPLE: type[Any] = tuple


class Sums(Deferred):
    """Partial sums [P, R, splits] of products of lazy values; `value` once they are computed.

    walked: the formula of the values where it is known, else None.
    """

    __slots__ = ("lins", "pairs", "rows", "value", "walked")

    def __init__(
        self, lins: list[Lin], pairs: list[tuple[int, int]], rows: int, walked: Formula | None
    ) -> None:
        self.lins, self.pairs, self.rows, self.walked = lins, pairs, rows, walked
        self.value: Tensor | None = None

    @property
    def formula(self) -> Formula:
        if self.walked is None:
            self.walked = Formula(self.lins)
        return self.walked

    def tensor(self) -> Tensor:
        if self.value is None:
            table = table_of(coefficients_of(self.formula, self.rows))
            self.value = run_gram(self.formula, self.pairs, table, self.rows)
        return self.value


class RowGram(Deferred):
    """A nested list of `RowScalar`s, as `gram` returns it: [K, K, B, ...], or one line of it."""

    __slots__ = ("cells",)

    def __init__(self, cells: list[Any]) -> None:
        self.cells = cells

    def __getitem__(self, index: Any) -> Any:
        places: tuple[Any, ...] = index if isinstance(index, _TUPLE) else (index,)
        cell: Any = self.cells
        for place in places:
            if type(place) is not int or isinstance(cell, RowScalar):
                return self.tensor()[index]
            cell = cell[place]
        return cell if isinstance(cell, RowScalar) else RowGram(cell)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self.cells)))

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def nodes(self) -> list[RowScalar]:
        """All scalars, line by line."""
        found: list[RowScalar] = []
        for cell in self.cells:
            found += [cell] if isinstance(cell, RowScalar) else cell
        return found

    def tensor(self) -> Tensor:
        """The inner products, computed together in one launch."""
        lines = self.cells if isinstance(self.cells[0], list) else [self.cells]
        RowScalar.evaluate(self.nodes)
        known = torch.stack([torch.stack([c.tensor() for c in line]) for line in lines])
        return known if lines is self.cells else known[0]


def joined_with(
    waiting: Sequence[Sums], formula: Formula, table: ScalarProgram, rows: int
) -> list[Sums]:
    """The reductions that can share a pass over the tensors of a formula, up to 8 products.

    table: the formula's coefficients, which must not depend on them.
    """
    known, room = set(map(id, formula.tensors)), MAX_PAIRS
    fit: list[Sums] = []
    needed: list[Any] = list(table.parts)
    for sums in waiting:
        fits = sums.value is None and sums.rows == rows and len(sums.pairs) <= room
        if fits and known.issuperset(map(id, sums.formula.tensors)):
            fit.append(sums)
            room -= len(sums.pairs)
            needed += coefficients_of(sums.formula, rows).parts
    return [sums for sums in fit if sums not in needed]


def coefficients_of(formula: Formula, rows: int) -> ScalarProgram:
    """The coefficients of a formula that are not launch constants."""
    nodes: list[RowScalar] = []
    for s in formula.coefficients:
        if type(s) is not RowScalar:
            shape = tuple(formula.tensors[0].shape)
            fine = s.ndim == len(shape) > 1 and math.prod(s.shape) > 1
            s = RowScalar.of(s, extent(tuple(s.shape) if fine else shape[:1], s.device))
        nodes.append(s)
    return ScalarProgram(nodes, rows)


def table_of(scalars: ScalarProgram) -> Tensor | None:
    """The values [C, rows] of coefficients, in one launch; None without any."""
    return run_scalars(scalars) if scalars.outs else None
