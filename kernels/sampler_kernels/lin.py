"""Lazy row-linear values.

    Lin = sum_k c_k · X_k,   X_k tensors of one shape [B, ...],   c_k scalars: floats, 0-d, or [B]

A `Lin` records the formula as its author wrote it, and nothing latent-sized is computed before
`settle` or `gram`. The reference backend evaluates the formula as written, operation by operation,
so a difference is formed before it is scaled, squared or projected, and plain CFG with DDIM rounds
as the same lines in diffusers do. The Triton backend does the same in registers.

A coefficient tensor of as many dimensions as the latents, as `gram(..., axes=...)` returns it,
broadcasts unchanged: then a row is one sample at one position of the axes that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Union

from sampler_kernels.opcodes import (
    ADD,
    DIV_CONST,
    DIV_TABLE,
    FILL,
    FIRST,
    LOAD,
    MUL_CONST,
    MUL_TABLE,
    SUB,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Scalar = Union[float, "Tensor"]

NAMES = {
    LOAD: "tensor",
    FIRST: "first",
    FILL: "constant",
    ADD: "add",
    SUB: "sub",
    MUL_CONST: "mul",
    MUL_TABLE: "mul",
    DIV_CONST: "div",
    DIV_TABLE: "div",
}


class Lin:
    """One node of a lazy row-linear formula; immutable.

    `op` is a code of `opcodes`: LOAD or FIRST (a: a tensor), FILL (a: a tensor of the shape, b: the
    constant), ADD or SUB (a, b: Lin), MUL_CONST or DIV_CONST (a: Lin, b: float), MUL_TABLE or
    DIV_TABLE (a: Lin, b: a tensor of scalars). `like` is a tensor of this value's shape and device
    (not its value, nor always its dtype).
    """

    __slots__ = ("a", "b", "like", "op")
    evaluate: ClassVar[Callable[[Lin, Any], Tensor]]
    """Computes one value in a dtype, or in the default one (None). Set by `rows`: the backends
    import this module."""

    def __init__(self, op: int, a: Any, b: Any = None) -> None:
        self.op = op
        self.a = a
        self.b = b
        self.like: Tensor = a.like if isinstance(a, Lin) else a

    @staticmethod
    def of(value: Tensor | Lin) -> Lin:
        """The lazy value of a tensor [B, ...]; a Lin is returned unchanged."""
        return value if isinstance(value, Lin) else Lin(LOAD, value)

    @staticmethod
    def ones(like: Tensor | Lin) -> Lin:
        """The constant 1 in the shape of `like`; for means: <v, 1>."""
        return Lin(FILL, Lin.of(like).like, 1.0)

    @staticmethod
    def zero(like: Tensor | Lin) -> Lin:
        """The constant 0 in the shape of `like`."""
        return Lin(FILL, Lin.of(like).like, 0.0)

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def is_zero(self) -> bool:
        """True for the constant 0, which sums and products drop."""
        return self.op == FILL and self.b == 0.0

    def __add__(self, other: Lin | Tensor | float) -> Lin:
        other = _operand(other, self)
        if other.is_zero:
            return self
        return other if self.is_zero else Lin(ADD, self, other)

    def __radd__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) + self

    def __sub__(self, other: Lin | Tensor | float) -> Lin:
        other = _operand(other, self)
        if other.is_zero:
            return self
        return -other if self.is_zero else Lin(SUB, self, other)

    def __rsub__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) - self

    def __mul__(self, scalar: Scalar) -> Lin:
        if isinstance(scalar, (int, float)):
            if scalar == 1 or self.is_zero:
                return self
            if scalar == 0:
                return Lin.zero(self)
            return Lin(MUL_CONST, self, float(scalar))
        return Lin(MUL_TABLE, self, _coefficient(scalar, self))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> Lin:
        if isinstance(scalar, (int, float)):
            if scalar == 1 or self.is_zero:
                return self
            return Lin(DIV_CONST, self, float(scalar))
        return self if self.is_zero else Lin(DIV_TABLE, self, _coefficient(scalar, self))

    def __neg__(self) -> Lin:
        return self * -1.0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Handle `tensor + lin`, `tensor - lin`, `tensor * lin`; nothing else in torch is linear.

        Calls the methods, not the operators: while torch.compile traces, `lin * tensor` is
        dispatched here too.
        """
        import torch

        if len(args) == 2:
            a, b = args
            if func in (torch.Tensor.mul, torch.Tensor.__mul__):
                return a.__mul__(b) if isinstance(a, Lin) else b.__mul__(a)
            if func in (torch.Tensor.add, torch.Tensor.__add__):
                return Lin.of(a).__add__(b)
            if func in (torch.Tensor.sub, torch.Tensor.__sub__):
                return Lin.of(a).__sub__(b)
            if func is torch.Tensor.__rsub__:
                return Lin.of(b).__sub__(a)
            if func in (torch.Tensor.div, torch.Tensor.__truediv__) and isinstance(a, Lin):
                return a.__truediv__(b)
        raise TypeError(f"{func} does not accept a Lin; pass lin.tensor().")

    def tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The value [B, ...], for operations that are not linear (clipping, Adam, a filter).

        `dtype`: round once to this type at the end; by default float32 or float64.
        """
        return Lin.evaluate(self, dtype)

    def __repr__(self) -> str:
        return f"Lin({NAMES[self.op]}, shape={tuple(self.shape)})"


def first_elements(node: Lin, known: dict[int, Lin]) -> Lin:
    """The same formula over the first element of each row; known: results by id of the node."""
    if node.op in (FILL, FIRST):
        return node
    if id(node) not in known:
        if node.op == LOAD:
            known[id(node)] = Lin(FIRST, node.a)
        else:
            b = node.b
            if isinstance(b, Lin):
                b = first_elements(b, known)
            elif getattr(b, "ndim", 0) > 1:
                b = b[(slice(None), *(slice(0, 1),) * (b.ndim - 1))]
            known[id(node)] = Lin(node.op, first_elements(node.a, known), b)
    return known[id(node)]


def inputs_of(lins: Sequence[Lin]) -> tuple[list[Tensor], list[Any]]:
    """The tensors, and the coefficients that are not floats; each once, in order of use."""
    tensors: list[Tensor] = []
    scalars: list[Any] = []
    seen: set[int] = set()
    for lin in lins:
        for node in _nodes(lin, seen):
            if node.op in (LOAD, FIRST):
                _add(tensors, node.a)
            elif node.op in (MUL_TABLE, DIV_TABLE):
                _add(scalars, node.b)
    return tensors, scalars


def has_pivot(lins: Sequence[Lin]) -> bool:
    """True where the formulas read first elements of rows."""
    return any(node.op == FIRST for lin in lins for node in _nodes(lin, set()))


def narrow(lin: Lin, limit: int, compute: Callable[[Lin], Tensor]) -> Lin:
    """The same value over at most `limit` tensors: its widest parts that fit are computed first."""
    while len(inputs_of([lin])[0]) > limit:
        width = {id(n): len(inputs_of([n])[0]) for n in _nodes(lin, set())}
        parts = [n for n in _nodes(lin, set()) if 1 < width[id(n)] <= limit]
        widest = max(parts, key=lambda n: width[id(n)])
        lin = _replaced(lin, widest, Lin.of(compute(widest)), {})
    return lin


def _nodes(node: Lin, seen: set[int]) -> Iterator[Lin]:
    """Every node of a formula once, operands first."""
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


def _operand(value: Any, near: Lin) -> Lin:
    if isinstance(value, Lin):
        return value
    if isinstance(value, (int, float)):
        if value == 0:
            return Lin.zero(near)
        raise TypeError("A number cannot be added to a Lin (only 0 can); use Lin.ones(x) * number.")
    return Lin.of(value)


def _coefficient(value: Any, near: Lin) -> Tensor:
    """A tensor of scalars, checked to be 0-d, one per row, or of as many dimensions as `near`."""
    dims, rows = value.ndim, near.like.shape[0]
    if dims == 0 or (dims == 1 and value.shape[0] in (1, rows)) or dims == len(near.like.shape):
        return value
    raise ValueError(
        f"A coefficient is a number or a tensor [{rows}], one per row, not {tuple(value.shape)}."
    )
