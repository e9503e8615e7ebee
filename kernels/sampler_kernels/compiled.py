"""Large latents on a CPU: the reference's formulas compiled by torch.compile, to the same bits.

Operation by operation, torch reads and writes every intermediate value of a formula; compiled, a
formula is one pass. The products of `gram` are compiled likewise and summed as the reference sums
them, in its order. Nothing is contracted or reassociated, so results are the reference's.

Compiling takes seconds, so it begins with the second use of a formula: what a run does once, at its
first or last step, is left to the reference. So is all that is not plain: gradients, float64,
tensors of other shapes or devices, tracing. Without a C++ compiler one warning says so.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sampler_kernels import programs, torch_ops
from sampler_kernels.deferred import computed
from sampler_kernels.programs import Formula
from sampler_kernels.rows import Lin

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def settle(lins: list[Lin], dtype: torch.dtype | None = None) -> list[Tensor]:
    """As `torch_ops.settle`."""
    own = [lin for lin in lins if lin.op != "leaf"]
    formula = _formula(own)
    values = formula and _run(formula, tuple(formula.outs), ())
    if values is None or formula is None:
        return torch_ops.settle(lins, dtype)
    done = {id(lin): v.to(dtype or v.dtype) for lin, v in zip(own, values, strict=True)}
    return [done[id(lin)] if id(lin) in done else torch_ops.settle([lin], dtype)[0] for lin in lins]


def gram(lins: list[Lin], axes: tuple[int, ...] | None) -> Tensor:
    """As `torch_ops.gram`."""
    formula, count = _formula(lins), len(lins)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    ends = formula and tuple((formula.outs[i], formula.outs[j]) for i, j in pairs)
    products = formula and _run(formula, (), ends or ())
    if products is None:
        return torch_ops.gram(lins, axes)
    sums = [torch_ops.row_sum(product, axes) for product in products]
    places = [pairs.index((min(i, j), max(i, j))) for i in range(count) for j in range(count)]
    flat = torch.stack([sums[place] for place in places])
    return flat.view(count, count, *flat.shape[1:])


recorded = torch_ops.recorded


class Program:
    """A formula that is compiled when it is used again; after a failure it is left alone."""

    def __init__(self, fn: Callable[..., list[Tensor]]) -> None:
        self.source, self.fn, self.uses, self.failed = fn, None, 0, False

    def __call__(self, *args: Any) -> list[Tensor] | None:
        self.uses += 1
        if self.uses == 1 or self.failed:
            return None
        self.fn = self.fn or torch.compile(self.source, fullgraph=True)
        try:
            return self.fn(*args)
        except Exception as error:  # whatever a missing or broken compiler raises
            self.failed = True
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            _say(f"{type(error).__name__}: {reason}")
            return None


@cache
def _say(reason: str) -> None:
    """Warns, once."""
    warnings.warn(
        f"Large latents are computed uncompiled, as torch.compile does not work here ({reason}). "
        "SAMPLER_KERNELS=reference silences this.",
        RuntimeWarning,
        stacklevel=3,
    )


@lru_cache(maxsize=256)
def _program(
    code: tuple[int, ...],
    outs: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
    forms: tuple[Any, ...],
) -> Program:
    def fn(numbers: Tensor, xs: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
        v = _values(code, numbers, xs, scalars)
        shape = xs[0].shape
        return [v[k].expand(shape) for k in outs] + [(v[i] * v[j]).expand(shape) for i, j in pairs]

    # torch.compile keeps what it has made by code object, up to a handful for each: every program
    # gets one of its own.
    own = types.FunctionType(
        fn.__code__.replace(co_name="formula"), fn.__globals__, closure=fn.__closure__
    )
    return Program(own)


def _values(
    code: Sequence[int], numbers: Tensor, xs: Sequence[Tensor], scalars: Sequence[Tensor]
) -> list[Tensor]:
    """Every node of a formula, unrolled while torch.compile traces."""
    v: list[Tensor] = []
    for i in range(0, len(code), 3):
        op, a, b = code[i : i + 3]
        if op == programs.LOAD:
            v.append(xs[a].float())
        elif op == programs.FIRST:
            v.append(torch_ops.first(xs[a]))
        elif op == programs.FILL:
            v.append(numbers[a])
        elif op in (programs.ADD, programs.SUB):
            v.append(v[a] + v[b] if op == programs.ADD else v[a] - v[b])
        else:
            by = numbers[b] if op in (programs.MUL_CONST, programs.DIV_CONST) else scalars[b]
            multiply = op in (programs.MUL_CONST, programs.MUL_TABLE)
            v.append(v[a] * by if multiply else v[a] / by)
    return v


def _run(
    formula: Formula, outs: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> list[Tensor] | None:
    """Nodes and products of nodes of a formula; None where the reference has to compute them."""
    ndim = formula.like.ndim
    scalars = [s.view(-1, *(1,) * (ndim - 1)) if s.ndim == 1 else s for s in formula.coefficients]
    forms = tuple((t.dtype, t.ndim) for t in (*formula.tensors, *scalars))
    program = _program(tuple(formula.code), outs, pairs, forms)
    numbers = torch.tensor(formula.consts, dtype=torch.float32)
    return program(numbers, formula.tensors, scalars)


def _formula(lins: Sequence[Lin]) -> Formula | None:
    """What can be compiled: plain float tensors of one shape on the CPU, and no gradients."""
    formula = Formula.of(lins)
    if not formula.tensors:
        return None
    formula.coefficients = [computed(s).float() for s in formula.coefficients]
    like = formula.like
    for t in (*formula.tensors, *formula.coefficients):
        if type(t) is not Tensor or t.dtype not in _FLOATS or t.device != like.device:
            return None
        if t.requires_grad and torch.is_grad_enabled():
            return None
    return formula if all(t.shape == like.shape for t in formula.tensors) else None
