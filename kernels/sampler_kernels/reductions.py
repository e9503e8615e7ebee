"""Deferred inner products: computed when a number of them is needed, or in a later shared pass.

A rule may reduce what only its next step reads (the cosine of adaptive guidance). Then the
reduction has no launch of its own: `fused.settle` computes it in the pass of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sampler_kernels.lin import Lin
from sampler_kernels.programs import Formula
from sampler_kernels.scalars import Deferred, RowScalar
from sampler_kernels.triton_ops import run_gram, run_scalars

# Products that one pass sums, each in its own registers.
MAX_PAIRS = 8


@dataclass(eq=False)
class Sums(Deferred):
    """Partial sums [P, R, splits] of products of lazy values; `value` once they are computed."""

    formula: Formula
    lins: list[Lin]
    pairs: list[tuple[int, int]]
    shape: tuple[int, ...]
    rows: int
    value: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.value is None:
            table = table_of(self.formula.coefficients, self.shape, self.rows)
            self.value = run_gram(self.formula, self.pairs, table, self.rows)
        return self.value


def joined_with(
    waiting: Sequence[Sums], tensors: Sequence[Tensor], scalars: Sequence[Any], rows: int
) -> list[Sums]:
    """The reductions that can share a pass over these tensors, up to 8 products."""
    known = {id(t) for t in tensors}
    fit: list[Sums] = []
    for sums in waiting:
        read = {id(t) for t in sums.formula.tensors}
        room = sum(len(other.pairs) for other in (*fit, sums)) <= MAX_PAIRS
        if sums.value is None and read <= known and sums.rows == rows and room:
            fit.append(sums)
    needed = pending([*scalars, *(s for sums in fit for s in sums.formula.coefficients)])
    return [sums for sums in fit if sums not in needed]


def pending(nodes: Sequence[Any]) -> list[Sums]:
    """The reductions that recorded scalars depend on and that are not computed yet."""
    found = [sums for sums in _parts(nodes, set()) if sums.value is None]
    return list({id(sums): sums for sums in found}.values())


def _parts(nodes: Sequence[Any], seen: set[int]) -> Iterator[Sums]:
    for node in nodes:
        if isinstance(node, Sums):
            yield node
        elif isinstance(node, RowScalar) and node.value is None and id(node) not in seen:
            seen.add(id(node))
            yield from _parts(node.args, seen)


def table_of(coefficients: Sequence[Any], shape: tuple[int, ...], rows: int) -> Tensor | None:
    """The coefficients that are not launch constants, [C, rows], in one launch."""
    if not coefficients:
        return None
    nodes = []
    for s in coefficients:
        fine = s.ndim == len(shape) > 1 and math.prod(s.shape) > 1
        nodes.append(RowScalar.of(s, tuple(s.shape) if fine else shape[:1], s.device))
    return run_scalars(nodes, rows)
