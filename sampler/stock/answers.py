"""Answers of a denoising network in a stock pipeline's step, evaluated in full or in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.stock.interception import Call
from sampler.stock.readings import replaced, tensor_of

_NOTHING = torch.empty(0)  # the value of an answer of another kind


@dataclass(frozen=True)
class Answer:
    """One network call of a step: what it was given and what the pipeline received.

    network: its number; count: rows of the call; raw: the answer as the pipeline received it;
    value: its tensor, empty for an answer of another kind; evaluated: bool [count], None for all
    rows; cost: rows of the network for each of these; readers: positions of later calls of the step
    that were handed the tensors of an answer of another kind (a ControlNet's residuals), row for
    row.
    """

    network: int
    count: int
    raw: Any
    value: Tensor
    evaluated: Tensor | None
    cost: int = 1
    readers: list[int] = field(default_factory=list[int])

    @property
    def key(self) -> tuple[int, int]:
        return self.network, self.count

    def is_handed_to(self, args: Any, kwargs: Mapping[str, Any], count: int) -> bool:
        """Return True if a call of `count` rows is given tensors of this answer."""
        if self.value.numel() or count != self.count or not isinstance(self.raw, (tuple, list)):
            return False
        own = leaves(self.raw)
        if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count for leaf in own):
            return False
        given = {id(leaf) for leaf in leaves([*args, *kwargs.values()])}
        return all(id(leaf) in given for leaf in own)


def whole(call: Call, args: Any, kwargs: Mapping[str, Any], count: int) -> tuple[Any, Tensor]:
    """The answer of a call of `count` rows, and its tensor."""
    raw = call(*args, **kwargs)
    value = tensor_of(raw)
    return raw, _NOTHING if value is None or len(value) != count else value


def scattered(raw: Any, due: Tensor, name: str, all_of_it: bool) -> tuple[Any, Tensor]:
    """The answer for all rows from that for the rows `due`, and its tensor.

    The others repeat an evaluated row, so that they are finite. name: of the network. all_of_it:
    every tensor of the answer, else only its first value. Raises ValueError for a network that
    answers with another number of rows than it was called on.
    """
    source, count = (due.cumsum(0) - 1).clamp_min(0), int(due.sum())

    def spread(part: Any) -> Tensor:
        if not isinstance(part, Tensor) or len(part) != count:
            raise ValueError(
                f"{name} answers {count} rows with another number of rows; sampler.guide cannot "
                "leave any out."
            )
        return part.index_select(0, source.to(part.device))

    if all_of_it:
        return map_tree(spread, raw), _NOTHING
    value = spread(tensor_of(raw))
    return replaced(raw, value), value
