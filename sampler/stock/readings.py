"""Relations between the answers of a network and what a stock pipeline gives to its scheduler.

A pipeline may cut, unpack or stack its network's answers before it guides them. A `Frame` brings
the scheduler's `model_output` and `sample` into one row per sample, and back; `rows_like` brings an
answer into the shape of a frame. Both are read from shapes alone, and the fit of `forms.py` decides
whether they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["leading", "trailing"]


@dataclass(frozen=True)
class Frame:
    """Bijection between the scheduler's tensors and rows of samples [B, ...].

    rows: of `model_output` or `sample`; back: `model_output` from guided rows and from the
    `model_output` that they replace.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Region:
    """First or last entries of one dimension of the rows of a frame: `length` from `start`."""

    dim: int
    start: int
    length: int

    def of(self, rows: Tensor) -> Tensor:
        return rows.narrow(self.dim, self.start, self.length)

    def rest(self, rows: Tensor) -> Tensor:
        """The other entries."""
        start = 0 if self.start else self.length
        return rows.narrow(self.dim, start, rows.shape[self.dim] - self.length)

    def put(self, part: Tensor, whole: Tensor) -> Tensor:
        """`whole` with other entries in this region."""
        made = whole.to(part, copy=True)
        self.of(made).copy_(part)
        return made


PLAIN = Frame("plain", lambda m: m, lambda g, m: g)


def frames(output: Tensor, x: Tensor, answers: list[Tensor]) -> Iterator[Frame]:
    """Frames that fit a `model_output`, a `sample` and the answers of a step, simplest first."""
    if output.shape == x.shape:
        yield PLAIN
    elif output.ndim == x.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
        yield _channels(x.shape[1])  # the variance of one branch rides along
    elif output.shape[1:] != x.shape[1:]:
        return
    half = len(x) // 2
    if len(x) % 2 == 0 and torch.equal(x[:half], x[half:]):
        yield Frame("copies", lambda m: m[: len(m) // 2], lambda g, m: torch.cat([g, g]))
    for t in answers:
        if t.ndim != x.ndim + 1:
            continue
        for at in (2, 1):  # [B, C, F, h, w] or [B, F, C, h, w], of which the scheduler sees frames
            count, rest = t.shape[at], t.shape[1:at] + t.shape[at + 1 :]
            if rest == x.shape[1:] and len(x) % count == 0:
                yield _folded(count, at)


def _channels(count: int) -> Frame:
    return Frame(
        "channels", lambda m: m[:, :count], lambda g, m: torch.cat([g, m[:, count:].to(g)], 1)
    )


def _folded(count: int, at: int) -> Frame:
    def rows(m: Tensor) -> Tensor:
        m = m.unflatten(0, (-1, count))
        return m.transpose(1, 2) if at == 2 else m

    def back(g: Tensor, _: Tensor) -> Tensor:
        g = g.transpose(1, 2) if at == 2 else g
        return g.flatten(0, 1)

    return Frame("frames", rows, back)


def rows_like(answer: Tensor, like: Tensor, part: Part) -> Tensor | None:
    """An answer [K·B, ...] with the trailing shape of `like` [B, ...]; None where it has another.

    Singleton dimensions are dropped or added, tokens become images or videos, and dimensions that
    are longer in the answer are cut: learned variances, tokens of reference images and of frames
    that are given.
    """
    if len(answer) % len(like):
        return None
    wanted = like.shape[1:]
    if answer.shape[1:] == wanted:
        return answer
    if answer.ndim == 3 and like.ndim in (4, 5) and answer.shape[2] == wanted[0]:
        places = math.prod(wanted[-2:])  # tokens [B, F·h·w, C] of a network without patches
        if answer.shape[1] % places:
            return None
        answer = answer.transpose(1, 2).unflatten(2, (-1, *wanted[-2:]))
        answer = answer if like.ndim == 5 else answer.flatten(2, 3)
    elif answer.ndim != like.ndim:
        if [n for n in answer.shape[1:] if n > 1] != [n for n in wanted if n > 1]:
            return None
        answer = answer.reshape(len(answer), *wanted)
    for dim, size in enumerate(wanted, 1):
        if answer.shape[dim] < size:
            return None
        if answer.shape[dim] > size:
            start = 0 if part == "leading" else answer.shape[dim] - size
            answer = answer.narrow(dim, start, size)
    return answer


def tensor_of(raw: Any) -> Tensor | None:
    """The first value of a network's answer as one tensor, None for answers of other kinds."""
    if isinstance(raw, Tensor):
        return raw
    value = next(iter(raw.values())) if isinstance(raw, Mapping) else raw
    value = value[0] if isinstance(raw, tuple) else value
    if isinstance(value, list) and value and all(isinstance(one, Tensor) for one in value):
        same = all(one.shape == value[0].shape for one in value)
        return torch.stack(value) if same else None
    return value if isinstance(value, Tensor) else None


def replaced(raw: Any, value: Tensor) -> Any:
    """The network's answer with another first value."""
    if isinstance(raw, Tensor):
        return value
    if isinstance(raw, Mapping):
        first = next(iter(raw.keys()))
        old = raw[first]
        new = list(value) if isinstance(old, list) else value
        return type(raw)(**{**raw, first: new})
    return (list(value) if isinstance(raw[0], list) else value, *raw[1:])


def is_single(raw: Any) -> bool:
    """Return True if an answer holds one value for every row and nothing else that has rows."""
    values = list(raw.values()) if isinstance(raw, Mapping) else raw
    if isinstance(raw, Tensor):
        return True
    return not any(isinstance(value, (Tensor, list, tuple)) for value in list(values)[1:])


__all__ = [
    "PLAIN",
    "Frame",
    "Part",
    "Region",
    "frames",
    "is_single",
    "replaced",
    "rows_like",
    "tensor_of",
]
