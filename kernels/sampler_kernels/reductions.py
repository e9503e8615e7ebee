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

    __slots__ = ("formula", "lins", "pairs", "rows", "shape", "value")

    def __init__(
        self,
        formula: Formula,
        lins: list[Lin],
        pairs: list[tuple[int, int]],
        shape: tuple[int, ...],
        rows: int,
    ) -> None:
        self.formula, self.lins, self.pairs = formula, lins, pairs
        self.shape, self.rows = shape, rows
        self.value: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.value is None:
            table = table_of(coefficients_of(self.formula, self.shape, self.rows))
            self.value = run_gram(self.formula, self.pairs, table, self.rows)
        return self.value


def joined_with(
    waiting: Sequence[Sums], formula: Formula, table: ScalarProgram, rows: int
) -> list[Sums]:
    """The reductions that can share a pass over the tensors of a formula, up to 8 products.

    table: the formula's coefficients, which must not depend on them.
    """
    known = {id(t) for t in formula.tensors}
    fit: list[Sums] = []
    for sums in waiting:
        room = sum(len(other.pairs) for other in (*fit, sums)) <= MAX_PAIRS
        reads = all(id(t) in known for t in sums.formula.tensors)
        if sums.value is None and reads and sums.rows == rows and room:
            fit.append(sums)
    own = coefficients_of
    needed = [p for sums in fit for p in own(sums.formula, sums.shape, rows).parts]
    needed += table.parts
    return [sums for sums in fit if all(sums is not other for other in needed)]


def coefficients_of(formula: Formula, shape: tuple[int, ...], rows: int) -> ScalarProgram:
    """The coefficients of a formula that are not launch constants."""
    nodes: list[RowScalar] = []
    for s in formula.coefficients:
        if type(s) is not RowScalar:
            fine = s.ndim == len(shape) > 1 and math.prod(s.shape) > 1
            s = RowScalar.of(s, extent(tuple(s.shape) if fine else shape[:1], s.device))
        nodes.append(s)
    return ScalarProgram(nodes, rows)


def table_of(scalars: ScalarProgram) -> Tensor | None:
    """The values [C, rows] of coefficients, in one launch; None without any."""
    return run_scalars(scalars) if scalars.outs else None
