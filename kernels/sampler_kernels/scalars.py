"""Per-row scalars that are not computed yet: the results of `gram` on the Triton backend.

A rule derives its coefficients from inner products by a dozen scalar operations. Run one by one on
a GPU, each would cost a launch, as much as a latent-sized operation. So they are recorded here, and
one small kernel (`triton_kernels.scalar_kernel`) reduces the partial sums and runs the record.

A `RowScalar` acts as a float32 tensor of its shape. What it does not record (any other torch
function or method) works too: then its value is computed first, in a launch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sampler_kernels.opcodes import (
    ADD,
    DIV,
    EQUAL,
    INPUT,
    LESS,
    LESS_EQUAL,
    MUL,
    SQRT,
    SUB,
    WHERE,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Annotated, so that what is tested against them stays of type Any.
_ITEMS: tuple[type[Any], ...] = (list, tuple)
_TUPLE: type[Any] = tuple


class Deferred:
    """A value that acts as the tensor `.tensor()` in torch functions, attributes, conversions."""

    __slots__ = ()

    def tensor(self) -> Tensor:
        raise NotImplementedError

    def __bool__(self) -> bool:
        return bool(self.tensor())

    def __float__(self) -> float:
        return float(self.tensor())

    def __len__(self) -> int:
        return len(self.tensor())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tensor())

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: dict[str, Any] = kwargs or {}
        known = {name: computed(value) for name, value in given.items()}
        return func(*map(computed, args), **known)


def computed(value: Any) -> Any:
    """The tensor behind a deferred value, also in lists and tuples; other values unchanged."""
    if isinstance(value, Deferred):
        return value.tensor()
    if isinstance(value, _ITEMS):
        return type(value)(computed(item) for item in value)
    return value


_TORCH = {ADD: "add", SUB: "sub", MUL: "mul", DIV: "div", LESS: "lt", LESS_EQUAL: "le", EQUAL: "eq"}


class RowScalar(Deferred):
    """One number per row: an operation with its arguments, and the value once it is known.

    `shape` is [B], or [B, kept..., 1...] for reductions over some axes. `truth`: the value is a
    condition. `sums`: the reductions that it depends on.
    """

    __slots__ = ("args", "device", "op", "shape", "sums", "truth", "value")
    __hash__ = object.__hash__
    evaluate: ClassVar[Callable[[Sequence[RowScalar]], None]]
    """Computes the values of some scalars in one launch. Set by `triton_ops`, which reads them."""

    def __init__(
        self,
        op: int,
        args: tuple[Any, ...],
        shape: tuple[int, ...],
        device: Any,
        truth: bool,
        sums: tuple[Any, ...] = (),
    ) -> None:
        self.op = op
        self.args = args
        self.shape = shape
        self.device = device
        self.truth = truth
        self.sums = sums
        self.value: Tensor | None = None

    @staticmethod
    def of(value: Any, shape: tuple[int, ...], device: Any) -> RowScalar:
        """A tensor that broadcasts to this shape, as a recorded scalar; a RowScalar unchanged."""
        if isinstance(value, RowScalar):
            return value
        if value.shape != shape:
            value = value.expand(shape)
        return RowScalar(INPUT, (value,), shape, device, False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bool if self.truth else torch.float32

    def tensor(self) -> Tensor:
        """The value, computed now: float32 (bool for a condition), of this shape."""
        if self.value is None:
            RowScalar.evaluate([self])
        assert self.value is not None
        return self.value

    def __add__(self, other: Any) -> Any:
        return self._binary(ADD, other)

    def __radd__(self, other: Any) -> Any:
        return self._binary(ADD, other, swap=True)

    def __sub__(self, other: Any) -> Any:
        return self._binary(SUB, other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary(SUB, other, swap=True)

    def __mul__(self, other: Any) -> Any:
        return self._binary(MUL, other)

    def __rmul__(self, other: Any) -> Any:
        return self._binary(MUL, other, swap=True)

    def __truediv__(self, other: Any) -> Any:
        return self._binary(DIV, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._binary(DIV, other, swap=True)

    def __lt__(self, other: Any) -> Any:
        return self._binary(LESS, other)

    def __le__(self, other: Any) -> Any:
        return self._binary(LESS_EQUAL, other)

    def __gt__(self, other: Any) -> Any:
        return self._binary(LESS, other, swap=True)

    def __ge__(self, other: Any) -> Any:
        return self._binary(LESS_EQUAL, other, swap=True)

    def __eq__(self, other: object) -> Any:
        return self._binary(EQUAL, other)

    def __ne__(self, other: object) -> Any:
        same = self._binary(EQUAL, other)
        return same if same is NotImplemented else ~same

    def __and__(self, other: Any) -> Any:
        if isinstance(other, RowScalar) and self.truth and other.truth:
            return select(self, other, self)
        return self.tensor() & computed(other)

    def __or__(self, other: Any) -> Any:
        if isinstance(other, RowScalar) and self.truth and other.truth:
            return select(self, self, other)
        return self.tensor() | computed(other)

    def __invert__(self) -> Any:
        if not self.truth:
            return ~self.tensor()
        return RowScalar(EQUAL, (self, 0.0), self.shape, self.device, True, self.sums)

    def __neg__(self) -> Any:
        return self * -1.0

    def __pow__(self, power: Any) -> Any:
        if isinstance(power, (int, float)) and power in (2, 0.5):
            return self.square() if power == 2 else self.sqrt()
        return self.tensor() ** power

    def sqrt(self) -> RowScalar:
        return RowScalar(SQRT, (self,), self.shape, self.device, False, self.sums)

    def square(self) -> RowScalar:
        return RowScalar(MUL, (self, self), self.shape, self.device, False, self.sums)

    def abs(self) -> Any:
        return select(self < 0.0, -self, self)

    def clamp(self, min: float | None = None, max: float | None = None) -> Any:
        """Clamp between numbers; as in torch, NaN stays NaN."""
        low = self if min is None else select(self < min, min, self)
        return low if max is None else select(low > max, max, low)

    def __repr__(self) -> str:
        return f"RowScalar({self.shape})"

    def _binary(self, op: int, other: Any, swap: bool = False) -> Any:
        """Record `self op other`; torch computes operands that are not numbers or such scalars."""
        sums = self.sums
        if type(other) is RowScalar and other.shape == self.shape:
            if other.sums is not sums:
                sums = _union(sums, other.sums)
        elif isinstance(other, (int, float)):
            if other == 1 and (op == MUL or op == DIV) and not swap and other is not True:
                return self
            other = float(other)
        elif not hasattr(other, "dtype"):
            return NotImplemented
        elif self._takes(other):
            other = RowScalar.of(other, self.shape, self.device)
        else:
            import torch

            pair = (computed(other), self.tensor()) if swap else (self.tensor(), computed(other))
            return getattr(torch, _TORCH[op])(*pair)
        pair = (other, self) if swap else (self, other)
        return RowScalar(op, pair, self.shape, self.device, op >= LESS, sums)

    def _takes(self, other: Any) -> bool:
        """Return True for a tensor that is an operand as it is: recording costs no launch."""
        if isinstance(other, Deferred) or getattr(other, "requires_grad", True):
            return False
        alike = tuple(other.shape) == self.shape and other.device == self.device
        return alike and other.dtype == self.dtype and other.is_contiguous()


class RowGram(Deferred):
    """A nested list of `RowScalar`s, as `gram` returns it: [K, K, B, ...], or one line of it."""

    __slots__ = ("cells",)

    def __init__(self, cells: list[Any]) -> None:
        self.cells = cells

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            cell: Any = self.cells[index]
            return cell if isinstance(cell, RowScalar) else RowGram(cell)
        if isinstance(index, _TUPLE) and len(index) == 2:
            i, j = index
            line: Any = self.cells[i] if type(i) is int else self.cells[0]
            if type(i) is type(j) is int and not isinstance(line, RowScalar):
                return line[j]
        return self.tensor()[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self.cells)))

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def nodes(self) -> list[RowScalar]:
        """All scalars, line by line."""
        found: list[RowScalar] = []
        for cell in self.cells:
            found += [cell] if isinstance(cell, RowScalar) else cell
        return found

    def tensor(self) -> Tensor:
        """The inner products, computed together in one launch."""
        import torch

        lines = self.cells if isinstance(self.cells[0], list) else [self.cells]
        RowScalar.evaluate(self.nodes)
        known = torch.stack([torch.stack([c.tensor() for c in line]) for line in lines])
        return known if lines is self.cells else known[0]


def select(condition: RowScalar, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`: numbers, or scalars of the condition's shape."""
    sums, truth = condition.sums, True
    parts: list[Any] = []
    for part in (yes, no):
        if type(part) is RowScalar and part.shape == condition.shape:
            sums = _union(sums, part.sums)
            truth = truth and part.truth
        elif isinstance(part, (int, float)):
            part, truth = float(part), False
        else:
            import torch

            return torch.where(condition.tensor(), computed(yes), computed(no))
        parts.append(part)
    args = (condition, *parts)
    return RowScalar(WHERE, args, condition.shape, condition.device, truth, sums)


def _union(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reductions of both, by identity."""
    if a is b or not b:
        return a
    if not a:
        return b
    return (*a, *(sums for sums in b if all(sums is not other for other in a)))
