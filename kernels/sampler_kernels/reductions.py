"""Deferred inner products: computed when a number of them is needed, or in a later shared pass.

A rule may reduce what only its next step reads (the cosine of adaptive guidance). Then the
reduction has no launch of its own: `fused.settle` computes it in the pass of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from sampler_kernels.lin import Lin
from sampler_kernels.programs import Formula
from sampler_kernels.scalars import Deferred, RowScalar
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
            table = table_of(self.formula.coefficients, self.shape, self.rows)
            self.value = run_gram(self.formula, self.pairs, table, self.rows)
        return self.value


def joined_with(waiting: Sequence[Sums], formula: Formula, rows: int) -> list[Sums]:
    """The reductions that can share a pass over the tensors of a formula, up to 8 products."""
    if not waiting:
        return []
    known = {id(t) for t in formula.tensors}
    fit: list[Sums] = []
    for sums in waiting:
        room = sum(len(other.pairs) for other in (*fit, sums)) <= MAX_PAIRS
        reads = all(id(t) in known for t in sums.formula.tensors)
        if sums.value is None and reads and sums.rows == rows and room:
            fit.append(sums)
    needed = pending(formula.coefficients)
    needed += pending(s for sums in fit for s in sums.formula.coefficients)
    return [sums for sums in fit if all(sums is not other for other in needed)]


def pending(scalars: Iterable[Any]) -> list[Sums]:
    """The reductions that recorded scalars depend on and that are not computed yet."""
    found: dict[int, Sums] = {}
    for scalar in scalars:
        if type(scalar) is RowScalar:
            for sums in scalar.sums:
                if sums.value is None:
                    found[id(sums)] = sums
    return list(found.values())


def table_of(coefficients: Sequence[Any], shape: tuple[int, ...], rows: int) -> Tensor | None:
    """The coefficients that are not launch constants, [C, rows], in one launch."""
    if not coefficients:
        return None
    nodes: list[RowScalar] = []
    for s in coefficients:
        if type(s) is not RowScalar:
            fine = s.ndim == len(shape) > 1 and math.prod(s.shape) > 1
            s = RowScalar.of(s, tuple(s.shape) if fine else shape[:1], s.device)
        nodes.append(s)
    return run_scalars(nodes, rows)
