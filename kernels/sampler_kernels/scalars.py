"""Per-row scalars that are not computed yet: the results of `gram` on the Triton backend.

A rule derives its coefficients from inner products by a dozen scalar operations. Run one by one on
a GPU, each would cost a launch, as much as a latent-sized operation. So they are recorded here, and
one small kernel (`triton_kernels.scalar_kernel`) reduces the partial sums and runs the record.

A `RowScalar` acts as a float32 tensor of its shape. What it does not record (any other torch
function or method) works too: then its value is computed first, in a launch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from sampler_kernels.deferred import Deferred, computed
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


class Extent:
    """Shape and device that scalars share, and the number of rows that they distinguish.

    types: the types of a number and of a condition.
    """

    __slots__ = ("device", "rows", "shape", "types")

    def __init__(self, shape: tuple[int, ...], device: Any) -> None:
        import torch

        self.shape, self.device, self.rows = shape, device, math.prod(shape)
        self.types = torch.float32, torch.bool

    def takes(self, value: Any, truth: bool) -> bool:
        """Return True for a tensor that is an operand as it is: recording costs no launch.

        truth: an operand is a condition, bool, else float32.
        """
        if isinstance(value, Deferred) or getattr(value, "requires_grad", True):
            return False
        if value.dtype is not self.types[truth] or value.shape != self.shape:
            return False
        return value.device == self.device and value.is_contiguous()


@lru_cache(maxsize=4096)
def extent(shape: tuple[int, ...], device: Any) -> Extent:
    """The extent of [B], or of [B, kept..., 1...] for reductions over some axes.

    The same object every time, so that scalars are compared by it.
    """
    return Extent(shape, device)


_TORCH = {ADD: "add", SUB: "sub", MUL: "mul", DIV: "div", LESS: "lt", LESS_EQUAL: "le", EQUAL: "eq"}


def _operator(op: int, swap: bool = False) -> Callable[[Any, Any], Any]:
    """The method that records `self op other`, or `other op self`; torch computes the rest.

    Recorded are numbers, scalars of the same extent, and tensors that are operands as they are.
    """
    truth = op >= LESS
    unit = op in (MUL, DIV) and not swap  # x * 1 and x / 1 are x

    def record(self: RowScalar, other: Any) -> Any:
        if type(other) is RowScalar and other.extent is self.extent:
            pass
        elif isinstance(other, (int, float)):
            if unit and other == 1 and other is not True:
                return self
            other = float(other)
        elif not hasattr(other, "dtype"):
            return NotImplemented
        elif self.extent.takes(other, self.truth):
            other = RowScalar(INPUT, (other,), self.extent)
        else:
            import torch

            pair = self.tensor(), computed(other)
            return getattr(torch, _TORCH[op])(*(pair[::-1] if swap else pair))
        return RowScalar(op, (other, self) if swap else (self, other), self.extent, truth)

    return record


class RowScalar(Deferred):
    """One number per row: an operation with its arguments, and the value once it is known.

    args: numbers and scalars; of PART (reduction, pair), of INPUT (tensor,). truth: the value is a
    condition.
    """

    __slots__ = ("args", "extent", "op", "truth", "value")
    __hash__ = object.__hash__
    evaluate: ClassVar[Callable[[Sequence[RowScalar]], None]]
    """Computes the values of some scalars in one launch. Set by `planning`, which reads them."""

    def __init__(self, op: int, args: tuple[Any, ...], extent: Extent, truth: bool = False) -> None:
        self.op = op
        self.args = args
        self.extent = extent
        self.truth = truth
        self.value: Tensor | None = None

    @staticmethod
    def of(value: Any, extent: Extent) -> RowScalar:
        """A tensor that broadcasts to this extent, as a recorded scalar; a RowScalar unchanged."""
        if isinstance(value, RowScalar):
            return value
        if value.shape != extent.shape:
            value = value.expand(extent.shape)
        return RowScalar(INPUT, (value,), extent)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.extent.shape

    @property
    def device(self) -> Any:
        return self.extent.device

    @property
    def ndim(self) -> int:
        return len(self.extent.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.extent.types[self.truth]

    def tensor(self) -> Tensor:
        """The value, computed now: float32 (bool for a condition), of this shape."""
        if self.value is None:
            RowScalar.evaluate([self])
        assert self.value is not None
        return self.value

    __add__, __radd__ = _operator(ADD), _operator(ADD, swap=True)
    __sub__, __rsub__ = _operator(SUB), _operator(SUB, swap=True)
    __mul__, __rmul__ = _operator(MUL), _operator(MUL, swap=True)
    __truediv__, __rtruediv__ = _operator(DIV), _operator(DIV, swap=True)
    __lt__, __gt__ = _operator(LESS), _operator(LESS, swap=True)
    __le__, __ge__ = _operator(LESS_EQUAL), _operator(LESS_EQUAL, swap=True)
    __eq__ = _operator(EQUAL)

    def __ne__(self, other: object) -> Any:
        same: Any = self == other
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
        return RowScalar(EQUAL, (self, 0.0), self.extent, True)

    def __neg__(self) -> Any:
        return self * -1.0

    def __pow__(self, power: Any) -> Any:
        if isinstance(power, (int, float)) and power in (2, 0.5):
            return self.square() if power == 2 else self.sqrt()
        return self.tensor() ** power

    def sqrt(self) -> RowScalar:
        return RowScalar(SQRT, (self,), self.extent)

    def square(self) -> RowScalar:
        return RowScalar(MUL, (self, self), self.extent)

    def abs(self) -> Any:
        return select(self < 0.0, -self, self)

    def clamp(self, min: float | None = None, max: float | None = None) -> Any:
        """Clamp between numbers; as in torch, NaN stays NaN."""
        low = self if min is None else select(self < min, min, self)
        return low if max is None else select(low > max, max, low)

    def __repr__(self) -> str:
        return f"RowScalar({self.shape})"


def select(condition: RowScalar, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`: numbers, scalars of the condition's extent, or
    tensors that are operands as they are.
    """
    truth = True
    parts: list[Any] = [condition]
    for part in (yes, no):
        if type(part) is RowScalar and part.extent is condition.extent:
            truth = truth and part.truth
        elif isinstance(part, (int, float)):
            part, truth = float(part), False
        elif condition.extent.takes(part, truth=False):
            part, truth = RowScalar(INPUT, (part,), condition.extent), False
        else:
            import torch

            return torch.where(condition.tensor(), computed(yes), computed(no))
        parts.append(part)
    return RowScalar(WHERE, tuple(parts), condition.extent, truth)
