"""Finds the launch of a program: prepared once for each layout of its inputs, and cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampler_kernels.deferred import computed
from sampler_kernels.fit import layout_of
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.scalars import RowScalar
from sampler_kernels.triton_ops import FormulaLaunch, GramLaunch, Launch, ScalarLaunch


class MadeLaunch(NamedTuple):
    """A launch that was made: its inputs, the nodes that its constants are of, and its outputs."""

    launch: Launch
    xs: tuple[Tensor, ...]
    consts: int
    numbers: Sequence[Any]
    table: Tensor | None
    outs: list[Tensor]


class ValuedScalars(NamedTuple):
    """Scalars that have got their values, the lines of `out`."""

    scalars: Sequence[RowScalar]
    out: Tensor


events: ContextVar[list[MadeLaunch | ValuedScalars] | None] = ContextVar(
    "sampler_kernels_events", default=None
)
"""A list that receives what happens in this context, for a replay of it; usually None."""


def run_formula(
    formula: Formula, table: Tensor | None, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """The values of a formula's outputs, as `FormulaLaunch` computes them."""
    layout = layout_of(formula)
    xs = tuple(formula.tensors) if layout.contiguous else formula.packed()
    launch = layout.launches.get((rows, dtype))
    if launch is None:
        launch = FormulaLaunch(formula, xs, rows, dtype, len(formula.outs))
        layout.launches[rows, dtype] = launch
    return _run(launch, xs, formula, table)


def run_gram(
    formula: Formula, pairs: Sequence[tuple[int, int]], table: Tensor | None, rows: int
) -> Tensor:
    """Partial sums [P, R, splits] of the inner products of a formula's outputs i, j."""
    return run_both(formula, 0, pairs, table, rows, torch.float32)[1]


def run_both(
    formula: Formula,
    count: int,
    pairs: Sequence[tuple[int, int]],
    table: Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """(the values of the first `count` outputs, `run_gram` of pairs of outputs) in one pass."""
    layout = layout_of(formula)
    xs = tuple(formula.tensors) if layout.contiguous else formula.packed()
    key = (rows, dtype, count, *pairs, *formula.outs, *formula.code[layout.size :])
    launch = layout.launches.get(key)
    if launch is None:
        launch = layout.launches[key] = GramLaunch(formula, xs, rows, dtype, count, pairs)
    *outs, sums = _run(launch, xs, formula, table)
    return outs, sums


def run_scalars(program: ScalarProgram) -> Tensor:
    """The values [C, rows] of recorded scalars."""
    parts = tuple([computed(sums) for sums in program.parts])
    inputs = tuple([x.float().contiguous() for x in program.inputs])
    splits = tuple([sums.shape[2] for sums in parts])
    key = (tuple(program.code), tuple(program.outs), splits, program.rows, program.device)
    launch = _scalar_launches.get(key)
    if launch is None:
        if len(_scalar_launches) >= _MAX_LAUNCHES:
            _scalar_launches.clear()
        launch = _scalar_launches[key] = ScalarLaunch(program, (*parts, *inputs), len(parts))
    return _run(launch, (*parts, *inputs), program, None)[0]


_scalar_launches: dict[Any, Launch] = {}
_MAX_LAUNCHES = 4096  # a run has a few dozen


def _run(
    launch: Launch,
    xs: tuple[Tensor, ...],
    program: Formula | ScalarProgram,
    table: Tensor | None,
) -> list[Tensor]:
    outs = launch.run(xs, tuple(program.consts), table)
    if (made := events.get()) is not None:
        made.append(MadeLaunch(launch, xs, len(program.consts), program.numbers, table, outs))
    return outs


def compute_scalars(nodes: Sequence[RowScalar]) -> None:
    """Compute the value of every recorded scalar: one launch for all of the same rows."""
    for mine, program in scalar_programs(nodes):
        set_values(mine, run_scalars(program))


RowScalar.evaluate = compute_scalars


def scalar_programs(nodes: Iterable[RowScalar]) -> list[tuple[list[RowScalar], ScalarProgram]]:
    """The scalars that have no value yet, by their number of rows, and the program of each."""
    groups: dict[int, dict[RowScalar, None]] = {}
    for node in nodes:
        if node.value is None:
            groups.setdefault(node.extent.rows, {})[node] = None
    found = [(list(groups[rows]), rows) for rows in sorted(groups)]
    return [(mine, ScalarProgram(mine, rows)) for mine, rows in found]


def set_values(nodes: Sequence[RowScalar], out: Tensor) -> None:
    """Keep the lines of `out` [C, rows] as the values of scalars."""
    for node, line in zip(nodes, out.unbind(), strict=True):
        value = line != 0 if node.truth else line
        node.value = value if node.ndim == 1 else value.view(node.shape)
    if (made := events.get()) is not None:
        made.append(ValuedScalars(nodes, out))
