"""Answers of a denoising network in a stock pipeline's step, evaluated in full or in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampler.stock.interception import Call
from sampler.stock.readings import replaced, tensor_of

_NOTHING = torch.empty(0)  # the value of an answer of another kind


@dataclass(frozen=True)
class Answer:
    """One network call of a step: what it was given and what the pipeline received.

    network: its number; count: rows of the call; raw: the answer as the pipeline received it;
    value: its tensor, empty for an answer of another kind; evaluated: bool [count]; cost: rows of
    the network for each of these.
    """

    network: int
    count: int
    raw: Any
    value: Tensor
    evaluated: Tensor
    cost: int = 1

    @property
    def key(self) -> tuple[int, int]:
        return self.network, self.count


def whole(call: Call, args: Any, kwargs: Mapping[str, Any], count: int) -> tuple[Any, Tensor]:
    """The answer of a call of `count` rows, and its tensor."""
    raw = call(*args, **kwargs)
    value = tensor_of(raw)
    return raw, _NOTHING if value is None or len(value) != count else value


def scattered(raw: Any, due: Tensor, name: str) -> tuple[Any, Tensor]:
    """The answer for all rows from that for the rows `due`, and its tensor.

    The others repeat an evaluated row, so that they are finite. name: of the network. Raises
    ValueError for one that answers with another number of rows than it was called on.
    """
    part = tensor_of(raw)
    if part is None or len(part) != int(due.sum()):
        raise ValueError(
            f"{name} answers {int(due.sum())} rows with another number of rows; sampler.guide "
            "cannot leave any out."
        )
    source = (due.cumsum(0) - 1).clamp_min(0)
    value = part.index_select(0, source.to(part.device))
    return replaced(raw, value), value
