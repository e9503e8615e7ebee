"""Launches of the kernels in `triton_kernels.py`.

The kernels read raw memory, so tensors that are not contiguous are copied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import triton_kernels
from sampler_kernels.counting import dry, record
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


def run_formula(
    formula: Formula, table: Tensor | None, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """The values of a formula's outputs: new contiguous tensors of the inputs' shape."""
    xs = [x.contiguous() for x in formula.tensors]
    like = xs[0]
    n = like.numel() // rows
    blocks = _ceil(n, BLOCK)
    outs = [new(like.shape, dtype, like.device) for _ in formula.outs]
    args = (tuple(xs), tuple(outs), tuple(formula.consts), table, rows, n, blocks)
    program = {"CODE": tuple(formula.code), "NODES": len(formula.code) // 3, "BLOCK": BLOCK}
    ends = {"OUTS": tuple(formula.outs), "M": len(outs)}
    _launch(_formula, rows * blocks, like.device, args, {**program, **ends})
    record("formula", _bytes(xs), _bytes(outs))
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
    xs = [x.contiguous() for x in formula.tensors]
    like = xs[0]
    n = like.numel() // rows
    blocks = _ceil(n, BLOCK)
    chunk = _ceil(blocks, MAX_SPLITS)
    splits = _ceil(blocks, chunk)
    outs = [new(like.shape, dtype, like.device) for _ in range(count)]
    sums = new((len(pairs), rows, splits), torch.float32, like.device)
    nodes = tuple(formula.outs[k] for pair in pairs for k in pair)
    numbers = (tuple(formula.consts), table, rows, n, splits, chunk)
    program = {"CODE": tuple(formula.code), "NODES": len(formula.code) // 3, "BLOCK": BLOCK}
    ends = {"OUTS": tuple(formula.outs[:count]), "M": count, "PAIRS": nodes, "P": len(pairs)}
    args = (tuple(xs), tuple(outs), sums, *numbers)
    _launch(_gram, rows * splits, like.device, args, {**program, **ends})
    record("both" if count else "gram", _bytes(xs), _bytes([*outs, sums]))
    return outs, sums


def run_scalars(nodes: Sequence[RowScalar], rows: int) -> Tensor:
    """The values [C, rows] of recorded scalars; rows is a multiple of every scalar's rows."""
    program = ScalarProgram.of(nodes, rows)
    splits = tuple(sums.shape[2] for sums in program.parts)
    out = new((len(nodes), rows), torch.float32, nodes[0].device)
    inputs = (tuple(program.parts), splits, tuple(program.inputs), tuple(program.consts))
    constants = {
        "CODE": tuple(program.code),
        "NODES": len(program.code) // 4,
        "OUTS": tuple(program.outs),
        "M": len(nodes),
        "LANES": 1 << (max(splits, default=1) - 1).bit_length(),
    }
    _launch(_scalar, rows, out.device, (*inputs, out, rows), constants)
    record("scalar", _bytes(program.parts) + _bytes(program.inputs), _bytes([out]))
    return out


def compute_scalars(nodes: Sequence[RowScalar]) -> None:
    """Compute the value of every recorded scalar: one launch for all of the same rows."""
    waiting = {id(node): node for node in nodes if node.value is None}
    for rows in sorted({node.rows for node in waiting.values()}):
        mine = [node for node in waiting.values() if node.rows == rows]
        table = run_scalars(mine, rows)
        for node, line in zip(mine, table, strict=True):
            node.value = (line != 0 if node.truth else line).view(node.shape)


RowScalar.evaluate = compute_scalars


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a kernel to write, every element of it."""
    make = torch.zeros if dry() else torch.empty
    return make(tuple(shape), dtype=dtype, device=device)


def _launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Launch on the tensors' device; Triton uses the current one."""
    if dry():
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **constants, **OPTIONS)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
