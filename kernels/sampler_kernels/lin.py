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

from collections.abc import Callable, Sequence
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
        self.like: Tensor = a if op <= FILL else a.like

    @staticmethod
    def of(value: Tensor | Lin) -> Lin:
        """The lazy value of a tensor [B, ...]; a Lin is returned unchanged."""
        return value if isinstance(value, Lin) else Lin(LOAD, value)

    @staticmethod
    def ones(like: Tensor | Lin) -> Lin:
        """The constant 1 in the shape of `like`; for means: <v, 1>."""
        return Lin(FILL, like.like if isinstance(like, Lin) else like, 1.0)

    @staticmethod
    def zero(like: Tensor | Lin) -> Lin:
        """The constant 0 in the shape of `like`."""
        return Lin(FILL, like.like if isinstance(like, Lin) else like, 0.0)

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    def __add__(self, other: Lin | Tensor | float) -> Lin:
        if type(other) is not Lin:
            other = _operand(other, self)
        if other.op == FILL and other.b == 0.0:
            return self
        return other if self.op == FILL and self.b == 0.0 else Lin(ADD, self, other)

    def __radd__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) + self

    def __sub__(self, other: Lin | Tensor | float) -> Lin:
        if type(other) is not Lin:
            other = _operand(other, self)
        if other.op == FILL and other.b == 0.0:
            return self
        return -other if self.op == FILL and self.b == 0.0 else Lin(SUB, self, other)

    def __rsub__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) - self

    def __mul__(self, scalar: Scalar) -> Lin:
        if type(scalar) is float or isinstance(scalar, (float, int)):
            if scalar == 1 or (self.op == FILL and self.b == 0.0):
                return self
            return Lin(MUL_CONST, self, float(scalar)) if scalar else Lin.zero(self)
        return Lin(MUL_TABLE, self, _coefficient(scalar, self))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> Lin:
        if self.op == FILL and self.b == 0.0:
            return self
        if isinstance(scalar, (float, int)):
            return self if scalar == 1 else Lin(DIV_CONST, self, float(scalar))
        return Lin(DIV_TABLE, self, _coefficient(scalar, self))

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


def replaced(node: Lin, old: Lin, new: Lin, known: dict[int, Lin]) -> Lin:
    """The same formula with a node exchanged; known: results by id of the node."""
    if node is old:
        return new
    if id(node) not in known:
        parts = [
            replaced(part, old, new, known) if isinstance(part, Lin) else part
            for part in (node.a, node.b)
        ]
        same = parts[0] is node.a and parts[1] is node.b
        known[id(node)] = node if same else Lin(node.op, *parts)
    return known[id(node)]


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
    shape, like = value.shape, near.like.shape
    dims = len(shape)
    if dims == 0 or (dims == 1 and shape[0] in (1, like[0])) or dims == len(like):
        return value
    raise ValueError(
        f"A coefficient is a number or a tensor [{like[0]}], one per row, not {tuple(shape)}."
    )
