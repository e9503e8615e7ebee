"""The reference backend: every formula in plain torch, as it was written.

Differentiable any number of times, exact in float64, on any device. Half-precision leaves are
converted to float32 at their first use, so arithmetic and results are float32 or float64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sampler_kernels.deferred import computed
from sampler_kernels.lin import Lin
from sampler_kernels.opcodes import (
    ADD,
    DIV_CONST,
    DIV_TABLE,
    FIRST,
    LOAD,
    MUL_CONST,
    MUL_TABLE,
    SUB,
)

# Summands per partial sum. A row is cut into pieces of this length before it is summed, so that
# the order of the additions depends neither on the batch size nor on the number of threads.
_CHUNK = 1024
_HALVES = (torch.float16, torch.bfloat16)


def settle(lins: list[Lin], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The values of lazy formulas, [B, ...] each; shared sub-formulas are computed once.

    They are float32 or float64, or rounded to `dtype` at the end.
    """
    memo: dict[int, Tensor] = {}
    values = [_value(lin, memo) for lin in lins]
    # The constant 1 is held as a single number until here.
    values = [
        v if v.shape == lin.shape else v.expand(lin.shape).contiguous()
        for v, lin in zip(values, lins, strict=True)
    ]
    return values if dtype is None else [v.to(dtype) for v in values]


def gram(lins: list[Lin], axes: tuple[int, ...] | None) -> Tensor:
    """G[i, j] = <V_i, V_j> per row: [K, K, B], or [K, K, B, ...] kept dimensions with axes."""
    memo: dict[int, Tensor] = {}
    values = [_value(lin, memo).expand(lin.shape) for lin in lins]
    count = len(values)
    sums: dict[tuple[int, int], Tensor] = {}
    for i in range(count):
        for j in range(i, count):
            sums[i, j] = sums[j, i] = row_sum(values[i] * values[j], axes)
    flat = torch.stack([sums[i, j] for i in range(count) for j in range(count)])
    return flat.view(count, count, *flat.shape[1:])


def recorded(value: Tensor) -> Tensor:
    """A per-row tensor, unchanged: here its arithmetic is computed at once."""
    return value


def first(x: Tensor) -> Tensor:
    """The first element of each row, [B, 1, ...]."""
    x = x.detach().flatten(1)[:, :1].view(-1, *(1,) * (x.ndim - 1))
    return x.float() if x.dtype in _HALVES else x


def _value(node: Lin, memo: dict[int, Tensor]) -> Tensor:
    op = node.op
    if op == LOAD and node.a.dtype not in _HALVES:
        return node.a
    key = id(node)
    value = memo.get(key)
    if value is not None:
        return value
    if op == ADD:
        value = _value(node.a, memo) + _value(node.b, memo)
    elif op == SUB:
        value = _value(node.a, memo) - _value(node.b, memo)
    elif op == MUL_CONST or op == DIV_CONST:
        a, b = _value(node.a, memo), node.b
        if type(a) is Tensor and not torch.compiler.is_compiling():
            b = _number(b, a.dtype)
        value = a * b if op == MUL_CONST else a / b
    elif op == MUL_TABLE or op == DIV_TABLE:
        a = _value(node.a, memo)
        b = _coefficient(node.b, a)
        value = a * b if op == MUL_TABLE else a / b
    elif op == LOAD:
        value = node.a.float()
    elif op == FIRST:
        value = first(node.a)
    else:
        dtype = torch.float64 if node.a.dtype == torch.float64 else torch.float32
        value = torch.full((1,) * node.a.ndim, node.b, dtype=dtype, device=node.a.device)
    memo[key] = value
    return value


@lru_cache(maxsize=4096)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor.

    torch converts a Python float to one at every operation, which takes longer than the operation
    itself on small latents.
    """
    with torch.inference_mode(False):  # a tensor of inference mode cannot be saved for backward
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def _coefficient(scalar: float | Tensor, like: Tensor) -> float | Tensor:
    """A per-row scalar, shaped so that it broadcasts over the rest of the row."""
    scalar = computed(scalar)
    if not isinstance(scalar, Tensor):
        return scalar
    if scalar.ndim == 1:
        scalar = scalar.view(-1, *(1,) * (like.ndim - 1))
    return scalar.to(like)


def row_sum(x: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """Sum over each row, [B], or over some axes (kept as 1)."""
    if axes is not None:
        kept = [d for d in range(x.ndim) if d not in axes]
        shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
        rows = x.permute(*kept, *axes).reshape(-1, *[x.shape[d] for d in axes])
        return row_sum(rows, None).view(shape)
    x = x.reshape(x.shape[0], -1)
    cut = x.shape[1] // _CHUNK * _CHUNK
    if cut == 0:
        return x.sum(1)
    parts = x[:, :cut].reshape(x.shape[0], -1, _CHUNK).sum(2)
    total = row_sum(parts, None)
    return total if cut == x.shape[1] else total + x[:, cut:].sum(1)
