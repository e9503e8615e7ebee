"""Deferred inner products: computed when a number of them is needed, or in a later shared pass.

A rule may reduce what only its next step reads (the cosine of adaptive guidance). Then the
reduction has no launch of its own: `fused.settle` computes it in the pass of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sampler_kernels.deferred import Deferred
from sampler_kernels.lin import Lin
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.scalars import RowScalar, extent
from sampler_kernels.triton_ops import run_gram, run_scalars

# Products that one pass sums, each in its own registers.
MAX_PAIRS = 8


class Sums(Deferred):
    """Partial sums [P, R, splits] of products of lazy values; `value` once they are computed."""

    __slots__ = ("formula", "lins", "pairs", "rows", "value")

    def __init__(
        self,
        formula: Formula,
        lins: list[Lin],
        pairs: list[tuple[int, int]],
        rows: int,
    ) -> None:
        self.formula, self.lins, self.pairs, self.rows = formula, lins, pairs, rows
        self.value: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.value is None:
            table = table_of(coefficients_of(self.formula, self.rows))
            self.value = run_gram(self.formula, self.pairs, table, self.rows)
        return self.value


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
