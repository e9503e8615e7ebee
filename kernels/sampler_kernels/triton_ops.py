"""Launches of the kernels in `triton_kernels.py`.

The kernels read raw memory, so tensors that are not contiguous are copied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import triton_kernels
from sampler_kernels.counting import dry, record
from sampler_kernels.fit import layout_of
from sampler_kernels.programs import Formula, ScalarProgram
from sampler_kernels.scalars import RowScalar

_kernels: Any = triton_kernels  # whose functions under @triton.jit have no types
_formula, _gram, _scalar = _kernels.formula_kernel, _kernels.gram_kernel, _kernels.scalar_kernel

# Elements per program. The interpreter pays per program, a GPU per idle multiprocessor.
BLOCK = 2048 if _kernels.INTERPRETED else 1024
# Most pieces into which a row is cut for its sums: one scalar program reads them at once. Their
# number depends on the length of the row only, so a row's sums do not depend on the batch.
MAX_SPLITS = 1024
# Contraction to fused multiply-adds would round differently from the reference, and its default
# changes between Triton versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Launch:
    """A launch that is prepared: kernel, number of programs, numbers, compile-time constants.

    shape: of its outputs. read, written: bytes of the tensors that it reads and writes.
    """

    __slots__ = (
        "constants",
        "cuda",
        "device",
        "kernel",
        "numbers",
        "programs",
        "read",
        "shape",
        "written",
    )

    def __init__(
        self,
        kernel: str,
        programs: int,
        device: torch.device,
        shape: Sequence[int],
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        traffic: tuple[int, int],
    ) -> None:
        self.kernel, self.programs = kernel, programs
        self.device, self.cuda = device, device.type == "cuda"
        self.shape = tuple(shape)  # allocates faster than a torch.Size
        self.numbers, self.constants = numbers, {**constants, **OPTIONS}
        self.read, self.written = traffic

    def __call__(self, kernel: Any, *args: Any) -> None:
        """Launch on the tensors' device; Triton uses the current one."""
        record(self.kernel, self.read, self.written)
        if dry():
            return
        if not self.cuda:
            kernel[(self.programs,)](*args, *self.numbers, **self.constants)
            return
        with torch.cuda.device(self.device):
            kernel[(self.programs,)](*args, *self.numbers, **self.constants)


def run_formula(
    formula: Formula, table: Tensor | None, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """The values of a formula's outputs: new contiguous tensors of the inputs' shape."""
    xs = formula.packed()
    launches = layout_of(formula).launches
    launch = launches.get((rows, dtype))
    if launch is None:
        launch = launches[rows, dtype] = _plan_formula(formula, xs, rows, dtype)
    outs = tuple([new(launch.shape, dtype, launch.device) for _ in formula.outs])
    launch(_formula, xs, outs, tuple(formula.consts), table, rows)
    return list(outs)


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
    xs = formula.packed()
    key = (rows, dtype, count, tuple(pairs))
    launches = layout_of(formula).launches
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _plan_both(formula, xs, *key)
    splits = launch.numbers[1]
    outs = tuple([new(launch.shape, dtype, launch.device) for _ in range(count)])
    sums = new((len(pairs), rows, splits), torch.float32, launch.device)
    launch(_gram, xs, outs, sums, tuple(formula.consts), table, rows)
    return list(outs), sums


def run_scalars(nodes: Sequence[RowScalar], rows: int) -> Tensor:
    """The values [C, rows] of recorded scalars; rows is a multiple of every scalar's rows."""
    program = ScalarProgram(nodes, rows)
    device = nodes[0].device
    splits = tuple([sums.shape[2] for sums in program.parts])
    sizes = [x.numel() for x in program.inputs]
    key = (*program.nodes, *program.outs, *splits, *sizes, rows, device)
    launch = _scalar_launches.get(key)
    if launch is None:
        if len(_scalar_launches) >= _MAX_LAUNCHES:
            _scalar_launches.clear()
        launch = _scalar_launches[key] = _plan_scalars(program, splits, device)
    out = new(launch.shape, torch.float32, device)
    parts, inputs = tuple(program.parts), tuple(program.inputs)
    launch(_scalar, parts, splits, inputs, tuple(program.consts), out, rows)
    return out


_scalar_launches: dict[Any, Launch] = {}
_MAX_LAUNCHES = 4096  # a run has a few dozen


def _plan_formula(formula: Formula, xs: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Launch:
    n = xs[0].numel() // rows
    blocks = _ceil(n, BLOCK)
    constants = {
        "CODE": tuple(formula.code),
        "NODES": len(formula.nodes),
        "OUTS": tuple(formula.outs),
        "M": len(formula.outs),
        "BLOCK": BLOCK,
    }
    written = len(formula.outs) * xs[0].numel() * dtype.itemsize
    traffic = (_bytes(xs), written)
    like = xs[0]
    return Launch(
        "formula", rows * blocks, like.device, like.shape, (n, blocks), constants, traffic
    )


def _plan_both(
    formula: Formula,
    xs: Sequence[Tensor],
    rows: int,
    dtype: torch.dtype,
    count: int,
    pairs: Sequence[tuple[int, int]],
) -> Launch:
    n = xs[0].numel() // rows
    blocks = _ceil(n, BLOCK)
    chunk = _ceil(blocks, MAX_SPLITS)
    splits = _ceil(blocks, chunk)
    constants = {
        "CODE": tuple(formula.code),
        "NODES": len(formula.nodes),
        "OUTS": tuple(formula.outs[:count]),
        "M": count,
        "PAIRS": tuple(formula.outs[k] for pair in pairs for k in pair),
        "P": len(pairs),
        "BLOCK": BLOCK,
    }
    written = count * xs[0].numel() * dtype.itemsize + len(pairs) * rows * splits * 4
    name, traffic = "both" if count else "gram", (_bytes(xs), written)
    numbers, like = (n, splits, chunk), xs[0]
    return Launch(name, rows * splits, like.device, like.shape, numbers, constants, traffic)


def _plan_scalars(program: ScalarProgram, splits: tuple[int, ...], device: torch.device) -> Launch:
    constants = {
        "CODE": tuple(program.code),
        "NODES": len(program.nodes),
        "OUTS": tuple(program.outs),
        "M": len(program.outs),
        "LANES": 1 << (max(splits, default=1) - 1).bit_length(),
    }
    traffic = _bytes(program.parts) + _bytes(program.inputs), len(program.outs) * program.rows * 4
    shape = (len(program.outs), program.rows)
    return Launch("scalar", program.rows, device, shape, (), constants, traffic)


def compute_scalars(nodes: Sequence[RowScalar]) -> None:
    """Compute the value of every recorded scalar: one launch for all of the same rows."""
    waiting = {id(node): node for node in nodes if node.value is None}
    for rows in sorted({node.rows for node in waiting.values()}):
        mine = [node for node in waiting.values() if node.rows == rows]
        table = run_scalars(mine, rows)
        for node, line in zip(mine, table.unbind(), strict=True):
            value = line != 0 if node.truth else line
            node.value = value if node.ndim == 1 else value.view(node.shape)


RowScalar.evaluate = compute_scalars


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a kernel to write, every element of it."""
    make = torch.zeros if dry() else torch.empty
    return make(shape, dtype=dtype, device=device)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
