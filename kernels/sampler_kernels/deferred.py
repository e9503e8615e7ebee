"""Values that are computed when a number of them is needed, and act as tensors until then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Annotated, so that what is tested against it stays of type Any.
_ITEMS: tuple[type[Any], ...] = (list, tuple)


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
