"""Lazy formulas: what they stand on, and how to cut one that is too wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sampler_kernels.rows import Lin

if TYPE_CHECKING:
    from torch import Tensor


def inputs_of(lins: Sequence[Lin]) -> tuple[list[Tensor], list[Any]]:
    """The tensors, and the coefficients that are no plain numbers; each once, in order of use."""
    tensors: list[Tensor] = []
    scalars: list[Any] = []
    seen: set[int] = set()
    for lin in lins:
        for node in _nodes(lin, seen):
            if node.op in ("leaf", "first"):
                _add(tensors, node.a)
            elif node.op in ("mul", "div") and not isinstance(node.b, float):
                _add(scalars, node.b)
    return tensors, scalars


def has_pivot(lins: Sequence[Lin]) -> bool:
    """Whether first elements of rows are in these formulas."""
    return any(node.op == "first" for lin in lins for node in _nodes(lin, set()))


def narrow(lin: Lin, limit: int, compute: Callable[[Lin], Tensor]) -> Lin:
    """The same value over at most `limit` tensors: its widest parts that fit are computed first."""
    while len(inputs_of([lin])[0]) > limit:
        width = {id(n): len(inputs_of([n])[0]) for n in _nodes(lin, set())}
        parts = [n for n in _nodes(lin, set()) if 1 < width[id(n)] <= limit]
        widest = max(parts, key=lambda n: width[id(n)])
        lin = _replaced(lin, widest, Lin.of(compute(widest)), {})
    return lin


def _nodes(node: Lin, seen: set[int]) -> Iterator[Lin]:
    """Every node below and with this one, once, operands first."""
    if id(node) in seen:
        return
    seen.add(id(node))
    for child in (node.a, node.b):
        if isinstance(child, Lin):
            yield from _nodes(child, seen)
    yield node


def _replaced(node: Lin, old: Lin, new: Lin, known: dict[int, Lin]) -> Lin:
    if node is old:
        return new
    if id(node) not in known:
        parts = [
            _replaced(part, old, new, known) if isinstance(part, Lin) else part
            for part in (node.a, node.b)
        ]
        same = parts[0] is node.a and parts[1] is node.b
        known[id(node)] = node if same else Lin(node.op, *parts)
    return known[id(node)]


def _add(items: list[Any], item: Any) -> None:
    if all(item is not other for other in items):
        items.append(item)
