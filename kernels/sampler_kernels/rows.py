"""Lazy row-linear values.

    Lin = sum_k c_k · X_k,   X_k tensors of one shape [B, ...],   c_k scalars: floats, 0-d, or [B]

A `Lin` remembers the formula as its author wrote it, and nothing latent-sized is computed before
`settle` or `gram` asks. The reference backend evaluates the formula as written, operation by
operation, so a difference is formed before it is scaled, squared or projected, and plain CFG with
DDIM rounds as the same lines in diffusers do. The Triton backend does the same in registers.

A coefficient tensor of as many dimensions as the latents, as `gram(..., axes=...)` returns it,
broadcasts as it is: then a row is one sample at one position of the axes that were kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from sampler_kernels.backend import backend
from sampler_kernels.deferred import Deferred, computed
from sampler_kernels.scalars import RowScalar, select
from sampler_kernels.trees import leaves, map_tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Scalar = Union[float, "Tensor"]


class Lin:
    """One node of a lazy row-linear formula; immutable.

    `op` is "leaf" (a: tensor), "first" (a: a tensor of whose rows the first element is meant),
    "ones" (a: a tensor whose shape the constant 1 takes), "zero" (likewise), "add" and "sub" (a, b:
    Lin), "mul" and "div" (a: Lin, b: scalar).
    """

    __slots__ = ("a", "b", "op")

    def __init__(self, op: str, a: Any, b: Any = None) -> None:
        self.op = op
        self.a = a
        self.b = b

    @staticmethod
    def of(value: Tensor | Lin) -> Lin:
        """The lazy value of a tensor [B, ...]; a Lin is returned as it is."""
        return value if isinstance(value, Lin) else Lin("leaf", value)

    @staticmethod
    def ones(like: Tensor | Lin) -> Lin:
        """The constant 1 of the shape of `like`; for means: <v, 1>."""
        return Lin("ones", Lin.of(like).like)

    @staticmethod
    def zero(like: Tensor | Lin) -> Lin:
        """The constant 0 of the shape of `like`."""
        return Lin("zero", Lin.of(like).like)

    @property
    def like(self) -> Tensor:
        """A tensor of this value's shape and device (not its value, nor always its dtype)."""
        node = self
        while isinstance(node, Lin):
            node = node.a
        return node

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    def __add__(self, other: Lin | Tensor | float) -> Lin:
        other = _operand(other, self)
        if other.op == "zero":
            return self
        return other if self.op == "zero" else Lin("add", self, other)

    def __radd__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) + self

    def __sub__(self, other: Lin | Tensor | float) -> Lin:
        other = _operand(other, self)
        if other.op == "zero":
            return self
        return -other if self.op == "zero" else Lin("sub", self, other)

    def __rsub__(self, other: Lin | Tensor | float) -> Lin:
        return _operand(other, self) - self

    def __mul__(self, scalar: Scalar) -> Lin:
        if isinstance(scalar, (int, float)):
            if scalar == 1 or self.op == "zero":
                return self
            if scalar == 0:
                return Lin.zero(self)
        return Lin("mul", self, _scalar(scalar, self))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> Lin:
        if self.op == "zero" or (isinstance(scalar, (int, float)) and scalar == 1):
            return self
        return Lin("div", self, _scalar(scalar, self))

    def __neg__(self) -> Lin:
        return self * -1.0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """`tensor + lin`, `tensor - lin`, `tensor * lin`; nothing else in torch is linear.

        By method and not by operator: while torch.compile traces, `lin * tensor` comes here too.
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
        raise TypeError(f"{func} does not know a Lin; give it lin.tensor().")

    def tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The value [B, ...], for the steps that are not linear (clipping, Adam, a filter).

        `dtype`: round once to this type on the way out; by default float32 or float64.
        """
        if dtype is None:
            return settle(self)
        return backend(self.like).settle([self], dtype)[0]

    def __repr__(self) -> str:
        return f"Lin({self.op}, shape={tuple(self.shape)})"


def gram(*vectors: Lin | Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Inner products per row: G[i, j, b] = <V_i[b], V_j[b]>, shape [K, K, B].

    `axes`: sum over these dimensions only (0, the batch, is not allowed); the result then is
    [K, K, B, ...] with the summed dimensions kept as 1, and broadcasts against the latents.
    Sums are in float32 (float64 for float64 vectors), in an order that does not depend on B.
    On the Triton backend the result is a `RowGram`, which acts as that tensor: its scalars are
    computed in one launch with the coefficients that are made of them.

    Raises ValueError for vectors of different shapes, or axes that are not dimensions of them.
    """
    lins = [Lin.of(v) for v in vectors]
    for lin in lins[1:]:
        if lin.shape != lins[0].shape:
            raise ValueError(
                f"gram needs vectors of one shape, not {tuple(lins[0].shape)} "
                f"and {tuple(lin.shape)}."
            )
    dims = None
    if axes is not None:
        ndim = len(lins[0].shape)
        dims = tuple(sorted({axis % ndim if -ndim <= axis < ndim else 0 for axis in axes}))
        if not dims or 0 in dims:
            raise ValueError(
                f"gram: axes {tuple(axes)} must lie in 1..{ndim - 1} (0 is the batch)."
            )
    return backend(lins[0].like).gram(lins, dims)


def pivot(value: Lin | Tensor) -> Lin:
    """The first element of each row, all over the row; a constant to gradients.

    A number near the others, for sums that do not depend on it: a variance taken of v − pivot(v)
    needs no mean beforehand and does not cancel where the mean is large.
    """
    return _firsts(Lin.of(value), {})


def settle(tree: Any) -> Any:
    """The same tree with every Lin computed: tensors of float32, or float64 for float64 inputs.

    All Lins of the tree are handed to the backend together, so that they can share one pass.
    A Lin that is just a float32 or float64 tensor gives that tensor itself, not a copy.
    """
    found = leaves(tree)
    lins = [leaf for leaf in found if isinstance(leaf, Lin)]
    late = [leaf for leaf in found if isinstance(leaf, Deferred)]
    if not lins and not late:
        return tree
    if late:  # of the Triton backend, the only one that defers
        from sampler_kernels.fused import finish

        values = finish(lins, late)
    else:
        values = backend(lins[0].like).settle(lins)
    done = dict(zip(map(id, [*lins, *late]), values, strict=True))
    return map_tree(lambda leaf: done.get(id(leaf), leaf), tree)


def recorded(value: Tensor, like: Tensor) -> Any:
    """A tensor [B] on the device of `like`, whose arithmetic costs no launches of its own.

    On the Triton backend what is made of it is computed together, as with the numbers of `gram`.
    """
    return backend(like).recorded(value.to(like.device).float())


def sqrt(value: Scalar) -> Any:
    """Square root of a scalar: a float, or a tensor of per-row scalars."""
    return math.sqrt(value) if isinstance(value, (int, float)) else value.sqrt()


def where(condition: Any, yes: Scalar, no: Scalar) -> Any:
    """`yes` where the condition holds, else `no`; for floats, or per-row scalar tensors."""
    if isinstance(condition, bool):
        return yes if condition else no
    if isinstance(condition, RowScalar):
        return select(condition, yes, no)
    import torch

    return torch.where(condition, computed(yes), computed(no))


def _firsts(node: Lin, known: dict[int, Lin]) -> Lin:
    if node.op in ("ones", "zero", "first"):
        return node
    if id(node) not in known:
        if node.op == "leaf":
            known[id(node)] = Lin("first", node.a)
        else:
            b = node.b
            if isinstance(b, Lin):
                b = _firsts(b, known)
            elif getattr(b, "ndim", 0) > 1:
                b = b[(slice(None), *(slice(0, 1),) * (b.ndim - 1))]
            known[id(node)] = Lin(node.op, _firsts(node.a, known), b)
    return known[id(node)]


def _operand(value: Any, near: Lin) -> Lin:
    if isinstance(value, Lin):
        return value
    if isinstance(value, (int, float)):
        if value == 0:
            return Lin.zero(near)
        raise TypeError("A number cannot be added to a Lin (only 0 can); use Lin.ones(x) * number.")
    return Lin.of(value)


def _scalar(value: Any, near: Lin) -> Scalar:
    if isinstance(value, (int, float)):
        return float(value)
    dims, rows = value.ndim, near.shape[0]
    if dims == 0 or (dims == 1 and value.shape[0] in (1, rows)) or dims == len(near.shape):
        return value
    raise ValueError(
        f"A coefficient is a number or a tensor [{rows}], one per row, not {tuple(value.shape)}."
    )
