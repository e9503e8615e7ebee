"""The Triton kernels, and the only importer of triton.

    formula_kernel   Y_m = any formula of sums, differences, multiples of X_k and constants
    gram_kernel      partial sums of <V_i, V_j>, the V formed in registers by the same formulas,
                     and in the same pass the Y_m of formulas that do not depend on these sums
    scalar_kernel    coefficients derived from the inner products, one program per row

Formulas arrive as programs (`programs.py`), which are unrolled at compile time, so a formula is
evaluated as it was written, in float32 registers, with one load per input and one store per
output. A row is [n] contiguous elements. Loads of any float type are taken to float32 at once.

Nothing is contracted to fused multiply-adds, division and square root round to nearest: apart
from the order of the sums in `gram`, results are those of the reference, bit for bit.
"""

# Triton's language is not typed, and annotations would only mean something to its compiler.
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sampler_kernels import opcodes

# Kernels are not specialized on `rows`, so that all batch sizes share programs; rows of a table,
# the inputs of scalar_kernel, are aligned or not depending on it.

# Read when the kernels below are decorated: True where Triton's interpreter runs them.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _node(
    v, xs, consts, table, at, mask, begin, row, rows,
    OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if OP == opcodes.LOAD:
        r = tl.load(xs[A] + at, mask=mask, other=0.0).to(tl.float32)
    elif OP == opcodes.FILL:
        r = tl.full((BLOCK,), 0.0, tl.float32) + consts[A]
    elif OP == opcodes.ADD:
        r = v[A] + v[B]
    elif OP == opcodes.SUB:
        r = v[A] - v[B]
    elif OP == opcodes.MUL_CONST:
        r = v[A] * consts[B]
    elif OP == opcodes.MUL_TABLE:
        r = v[A] * tl.load(table + B * rows + row)
    elif OP == opcodes.DIV_CONST:
        r = tl.div_rn(v[A], tl.full((BLOCK,), 0.0, tl.float32) + consts[B])
    elif OP == opcodes.DIV_TABLE:
        r = tl.div_rn(v[A], tl.full((BLOCK,), 0.0, tl.float32) + tl.load(table + B * rows + row))
    else:  # FIRST
        r = tl.full((BLOCK,), 0.0, tl.float32) + tl.load(xs[A] + begin).to(tl.float32)
    return r


@triton.jit(do_not_specialize=["rows"])
def formula_kernel(
    xs, ys, consts, table, rows, n, blocks,
    CODE: tl.constexpr, NODES: tl.constexpr, OUTS: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n
    at = row * n + col
    v = ()
    for i in tl.static_range(NODES):
        v = v + (
            _node(v, xs, consts, table, at, mask, row * n, row, rows,
                  CODE[3 * i], CODE[3 * i + 1], CODE[3 * i + 2], BLOCK),
        )  # fmt: skip
    for m in tl.static_range(M):
        tl.store(ys[m] + at, v[OUTS[m]].to(ys[m].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gram_kernel(
    xs, ys, sums, consts, table, rows, n, splits, chunk,
    CODE: tl.constexpr, NODES: tl.constexpr, OUTS: tl.constexpr, M: tl.constexpr,
    PAIRS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    totals = ()
    for _ in tl.static_range(P):
        totals = totals + (tl.zeros((BLOCK,), tl.float32),)
    for step in range(chunk):
        col = (split * chunk + step).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = col < n
        at = row * n + col
        v = ()
        for i in tl.static_range(NODES):
            v = v + (
                _node(v, xs, consts, table, at, mask, row * n, row, rows,
                      CODE[3 * i], CODE[3 * i + 1], CODE[3 * i + 2], BLOCK),
            )  # fmt: skip
        for m in tl.static_range(M):
            tl.store(ys[m] + at, v[OUTS[m]].to(ys[m].dtype.element_ty), mask=mask)
        more = ()
        for p in tl.static_range(P):
            product = v[PAIRS[2 * p]] * v[PAIRS[2 * p + 1]]
            # Not only loads: beyond the row, coefficients of inf or NaN would meet zeros.
            more = more + (totals[p] + tl.where(mask, product, 0.0),)
        totals = more
    for p in tl.static_range(P):
        tl.store(sums + (p * rows + row) * splits + split, tl.sum(totals[p]))


@triton.jit
def _scalar(
    v, parts, splits, inputs, consts, row, rows,
    OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    if OP == opcodes.PART:
        lane = tl.arange(0, LANES)
        at = (B * (rows // C) + row // C) * splits[A] + lane
        r = tl.sum(tl.load(parts[A] + at, mask=lane < splits[A], other=0.0))
    elif OP == opcodes.INPUT:
        r = tl.load(inputs[A] + row // C)
    elif OP == opcodes.CONST:
        r = tl.full((), 0.0, tl.float32) + consts[A]
    elif OP == opcodes.ADD:
        r = v[A] + v[B]
    elif OP == opcodes.SUB:
        r = v[A] - v[B]
    elif OP == opcodes.MUL:
        r = v[A] * v[B]
    elif OP == opcodes.DIV:
        r = tl.div_rn(v[A], v[B])
    elif OP == opcodes.SQRT:
        r = tl.sqrt_rn(v[A])
    elif OP == opcodes.LESS:
        r = tl.where(v[A] < v[B], 1.0, 0.0)
    elif OP == opcodes.LESS_EQUAL:
        r = tl.where(v[A] <= v[B], 1.0, 0.0)
    elif OP == opcodes.EQUAL:
        r = tl.where(v[A] == v[B], 1.0, 0.0)
    else:  # WHERE
        r = tl.where(v[A] != 0.0, v[B], v[C])
    return r


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["inputs"])
def scalar_kernel(
    parts, splits, inputs, consts, out, rows,
    CODE: tl.constexpr, NODES: tl.constexpr, OUTS: tl.constexpr, M: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = ()
    for i in tl.static_range(NODES):
        v = v + (
            _scalar(v, parts, splits, inputs, consts, row, rows,
                    CODE[4 * i], CODE[4 * i + 1], CODE[4 * i + 2], CODE[4 * i + 3], LANES),
        )  # fmt: skip
    for m in tl.static_range(M):
        tl.store(out + m * rows + row, v[OUTS[m]])
