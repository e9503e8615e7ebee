"""Launches of the kernels in `triton_kernels.py`, prepared for one program and layout.

What a launch is called with are tensors, contiguous since the kernels read raw memory, and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import triton_kernels
from sampler_kernels.counting import counting, dry, record
from sampler_kernels.programs import Formula, ScalarProgram

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

Tensors = tuple[Tensor, ...]


class Launch:
    """A launch that is prepared: kernel, number of programs, numbers, compile-time constants.

    rows: of the tables that it reads. traffic: bytes of the tensors that it reads and writes.
    """

    __slots__ = ("constants", "cuda", "device", "grid", "kernel", "numbers", "rows", "traffic")

    def __init__(
        self,
        kernel: str,
        programs: int,
        device: torch.device,
        rows: int,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        traffic: tuple[int, int],
    ) -> None:
        self.kernel, self.grid, self.rows = kernel, (programs,), rows
        self.device, self.cuda = device, device.type == "cuda"
        self.numbers, self.constants = numbers, {**constants, **OPTIONS}
        self.traffic = traffic

    def run(self, xs: Tensors, consts: tuple[float, ...], table: Tensor | None) -> list[Tensor]:
        """Launch over inputs, numbers and coefficients [C, rows]; the new tensors it writes."""
        raise NotImplementedError

    def start(self, kernel: Any, *args: Any) -> None:
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


class FormulaLaunch(Launch):
    """The values of a formula's outputs: new contiguous tensors of the inputs' shape."""

    __slots__ = ("count", "dtype")

    def __init__(
        self, formula: Formula, xs: Tensors, rows: int, dtype: torch.dtype, count: int
    ) -> None:
        self.count, self.dtype = count, dtype
        n = xs[0].numel() // rows
        blocks = -(-n // BLOCK)
        constants = {**_program(formula, count), "BLOCK": BLOCK}
        traffic = _bytes(xs), count * xs[0].numel() * dtype.itemsize
        super().__init__(
            "formula", rows * blocks, xs[0].device, rows, (n, blocks), constants, traffic
        )

    def run(self, xs: Tensors, consts: tuple[float, ...], table: Tensor | None) -> list[Tensor]:
        outs = new_like(xs[0], self.dtype, self.count)
        self.start(_formula, xs, tuple(outs), consts, table, self.rows)
        return outs


class GramLaunch(Launch):
    """The values of the first `count` outputs of a formula, and in the same pass the partial sums
    [P, R, splits] of products of outputs i, j: a list of both.
    """

    __slots__ = ("count", "dtype", "sums")

    def __init__(
        self,
        formula: Formula,
        xs: Tensors,
        rows: int,
        dtype: torch.dtype,
        count: int,
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        n = xs[0].numel() // rows
        blocks = -(-n // BLOCK)
        chunk = -(-blocks // MAX_SPLITS)
        splits = -(-blocks // chunk)
        self.count, self.dtype, self.sums = count, dtype, (len(pairs), rows, splits)
        constants = {
            **_program(formula, count),
            "PAIRS": tuple(formula.outs[k] for pair in pairs for k in pair),
            "P": len(pairs),
            "BLOCK": BLOCK,
        }
        written = count * xs[0].numel() * dtype.itemsize + math.prod(self.sums) * 4
        name, traffic = "both" if count else "gram", (_bytes(xs), written)
        numbers = n, splits, chunk
        super().__init__(name, rows * splits, xs[0].device, rows, numbers, constants, traffic)

    def run(self, xs: Tensors, consts: tuple[float, ...], table: Tensor | None) -> list[Tensor]:
        outs = new_like(xs[0], self.dtype, self.count)
        sums = new(self.sums, torch.float32, self.device)
        self.start(_gram, xs, tuple(outs), sums, consts, table, self.rows)
        return [*outs, sums]


class ScalarLaunch(Launch):
    """The values [C, rows] of recorded scalars. Its inputs are partial sums, then tensors."""

    __slots__ = ("lines", "parts", "splits")

    def __init__(self, program: ScalarProgram, xs: Tensors, parts: int) -> None:
        self.lines, self.parts = len(program.outs), parts
        self.splits = tuple([x.shape[2] for x in xs[:parts]])
        constants = {
            "CODE": tuple(program.code),
            "NODES": len(program.code) // 4,
            "OUTS": tuple(program.outs),
            "M": self.lines,
            "LANES": 1 << (max(self.splits, default=1) - 1).bit_length(),
        }
        rows, traffic = program.rows, (_bytes(xs), 4 * self.lines * program.rows)
        super().__init__("scalar", rows, program.device, rows, (), constants, traffic)

    def run(self, xs: Tensors, consts: tuple[float, ...], table: Tensor | None) -> list[Tensor]:
        out = new((self.lines, self.rows), torch.float32, self.device)
        parts, inputs = xs[: self.parts], xs[self.parts :]
        self.start(_scalar, parts, self.splits, inputs, consts, out, self.rows)
        return [out]


def _program(formula: Formula, count: int) -> dict[str, Any]:
    """The constants of a formula of which `count` outputs are written."""
    return {
        "CODE": tuple(formula.code),
        "NODES": len(formula.code) // 3,
        "OUTS": tuple(formula.outs[:count]),
        "M": count,
    }


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a kernel to write, every element of it."""
    make = torch.zeros if dry() else torch.empty
    return make(shape, dtype=dtype, device=device)


def new_like(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """The same, `count` times in the shape of a contiguous tensor, which takes torch less time."""
    make = torch.zeros_like if dry() else torch.empty_like
    return [make(x, dtype=dtype) for _ in range(count)]


def _bytes(tensors: Tensors) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
