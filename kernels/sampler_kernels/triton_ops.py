"""Launches of the kernels in `triton_kernels.py`.

The kernels read raw memory, so tensors that are not contiguous are copied first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import triton_kernels
from sampler_kernels.counting import dry, record, counting
from sampler_kernels.deferred import computed
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

    traffic: bytes of the tensors that it reads and writes.
    """

    __slots__ = ("constants", "cuda", "device", "grid", "kernel", "numbers", "traffic")

    def __init__(
        self,
        kernel: str,
        programs: int,
        device: torch.device,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        traffic: tuple[int, int],
    ) -> None:
        self.kernel, self.grid = kernel, (programs,)
        self.device, self.cuda = device, device.type == "cuda"
        self.numbers, self.constants = numbers, {**constants, **OPTIONS}
        self.traffic = traffic

    def __call__(self, kernel: Any, *args: Any) -> None:
        """Launch on the tensors' device; Triton uses the current one."""
        if counting() is not None:
            record(self.kernel, *self.traffic)
            if dry():
                return
        if not self.cuda:
            kernel[self.grid](*args, *self.numbers, **self.constants)
            return
        with torch.cuda.device(self.device):
            kernel[self.grid](*args, *self.numbers, **self.constants)


def run_formula(
    formula: Formula, table: Tensor | None, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """The values of a formula's outputs: new contiguous tensors of the inputs' shape."""
    layout = layout_of(formula)
    xs = tuple(formula.tensors) if layout.contiguous else formula.packed()
    launch = layout.launches.get((rows, dtype))
    if launch is None:
        launch = layout.launches[rows, dtype] = _plan_formula(formula, xs, rows, dtype)
    outs = new_like(xs[0], dtype, len(formula.outs))
    launch(_formula, xs, tuple(outs), tuple(formula.consts), table, rows)
    return outs


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
        launch = _plan_both(formula, xs, rows, dtype, count, pairs)
        layout.launches[key] = launch
    outs = new_like(xs[0], dtype, count)
    sums = new((len(pairs), rows, launch.numbers[1]), torch.float32, launch.device)
    launch(_gram, xs, tuple(outs), sums, tuple(formula.consts), table, rows)
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
        launch = _scalar_launches[key] = _plan_scalars(program, parts, inputs, splits)
    out = new((len(program.outs), program.rows), torch.float32, program.device)
    launch(_scalar, parts, splits, inputs, tuple(program.consts), out, program.rows)
    return out


_scalar_launches: dict[Any, Launch] = {}
_MAX_LAUNCHES = 4096  # a run has a few dozen


def _plan_formula(formula: Formula, xs: Sequence[Tensor], rows: int, dtype: torch.dtype) -> Launch:
    n = xs[0].numel() // rows
    blocks = _ceil(n, BLOCK)
    constants = {
        "CODE": tuple(formula.code),
        "NODES": len(formula.code) // 3,
        "OUTS": tuple(formula.outs),
        "M": len(formula.outs),
        "BLOCK": BLOCK,
    }
    written = len(formula.outs) * xs[0].numel() * dtype.itemsize
    traffic = (_bytes(xs), written)
    return Launch("formula", rows * blocks, xs[0].device, (n, blocks), constants, traffic)


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
        "NODES": len(formula.code) // 3,
        "OUTS": tuple(formula.outs[:count]),
        "M": count,
        "PAIRS": tuple(formula.outs[k] for pair in pairs for k in pair),
        "P": len(pairs),
        "BLOCK": BLOCK,
    }
    written = count * xs[0].numel() * dtype.itemsize + len(pairs) * rows * splits * 4
    name, traffic = "both" if count else "gram", (_bytes(xs), written)
    return Launch(name, rows * splits, xs[0].device, (n, splits, chunk), constants, traffic)


def _plan_scalars(
    program: ScalarProgram,
    parts: Sequence[Tensor],
    inputs: Sequence[Tensor],
    splits: tuple[int, ...],
) -> Launch:
    constants = {
        "CODE": tuple(program.code),
        "NODES": len(program.code) // 4,
        "OUTS": tuple(program.outs),
        "M": len(program.outs),
        "LANES": 1 << (max(splits, default=1) - 1).bit_length(),
    }
    traffic = _bytes((*parts, *inputs)), 4 * len(program.outs) * program.rows
    return Launch("scalar", program.rows, program.device, (), constants, traffic)


def compute_scalars(nodes: Sequence[RowScalar]) -> None:
    """Compute the value of every recorded scalar: one launch for all of the same rows."""
    for mine, program in scalar_programs(nodes):
        set_values(mine, program)


def scalar_programs(nodes: Iterable[RowScalar]) -> list[tuple[list[RowScalar], ScalarProgram]]:
    """The scalars that have no value yet, by their number of rows, and the program of each."""
    groups: dict[int, dict[int, RowScalar]] = {}
    for node in nodes:
        if node.value is None:
            groups.setdefault(node.extent.rows, {})[id(node)] = node
    found = [(list(groups[rows].values()), rows) for rows in sorted(groups)]
    return [(mine, ScalarProgram(mine, rows)) for mine, rows in found]


def set_values(nodes: Sequence[RowScalar], program: ScalarProgram) -> None:
    """Run the program of some scalars, and keep their values."""
    for node, line in zip(nodes, run_scalars(program).unbind(), strict=True):
        value = line != 0 if node.truth else line
        node.value = value if node.ndim == 1 else value.view(node.shape)


RowScalar.evaluate = compute_scalars


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a kernel to write, every element of it."""
    make = torch.zeros if dry() else torch.empty
    return make(shape, dtype=dtype, device=device)


def new_like(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """The same, `count` times in the shape of a contiguous tensor, which takes torch less time."""
    make = torch.zeros_like if dry() else torch.empty_like
    return [make(x, dtype=dtype) for _ in range(count)]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
