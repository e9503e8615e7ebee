"""Values that compute themselves as soon as torch looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Deferred:
    """Acts as the tensor `.tensor()` in every torch function, attribute and conversion."""

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
        known = {name: computed(value) for name, value in (kwargs or {}).items()}
        return func(*map(computed, args), **known)


def computed(value: Any) -> Any:
    """The tensor behind a deferred value, in lists and tuples too; anything else as it is."""
    if isinstance(value, Deferred):
        return value.tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(computed(item) for item in value)
    return value
