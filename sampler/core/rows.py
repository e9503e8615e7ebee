"""Steps of samples at levels of their own: level tensors [B] in a grid.

A sampler never sees such tensors. Samples with equal levels and an equal past are stepped together,
with floats as levels, as a batch of their own. A sample that waits (its two levels are equal) or is
finished (sigma = 0) keeps x and its history, so that each result is that of a run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from sampler_kernels import Lin, map_tree, settle
from torch import Tensor

from sampler.types import Level, Move, Prediction, Sampler, Span


class Group(NamedTuple):
    """Samples with an equal past: their rows, the steps they have taken and the sampler's state."""

    rows: tuple[int, ...]
    moves: int
    state: Any


class Groups(NamedTuple):
    """State of a sampler whose samples have levels of their own."""

    groups: tuple[Group, ...]


def has_levels_of_rows(levels: Sequence[Level]) -> bool:
    """Return True if a grid has level tensors [B] instead of floats."""
    return any(isinstance(level.sigma, Tensor) for level in levels)


def moves_of_rows(levels: Sequence[Level], count: int) -> tuple[int, ...]:
    """Number of steps of a grid that change a sample's level, for each of `count` samples."""
    own = [of_rows(level, count) for level in levels]
    return tuple(
        sum(a[b] != c[b] for a, c in zip(own, own[1:], strict=False)) for b in range(count)
    )


def step_rows(
    method: Sampler, x: Tensor, pred: Prediction, span: Span, state: Any, totals: Sequence[int]
) -> Move:
    """One step of x [B, ...] on level tensors; `totals` has the number of steps of each sample.

    The move's std is a tensor [B]; its state is `Groups`.
    """
    count = x.shape[0]
    if not isinstance(state, Groups):
        state = Groups((Group(tuple(range(count)), 0, state),))
    now, after = of_rows(span.now, count), of_rows(span.next, count)
    out, direction = settle((pred.out, pred.direction))
    mean, std, kept = x, torch.zeros(count, dtype=torch.float64), list[Group]()
    over: list[Any] = [None] * count
    for group in state.groups:
        parts: dict[Any, list[int]] = {}
        for row in group.rows:
            moving = _moves(method, group, now[row], after[row])
            key = (now[row], after[row], totals[row]) if moving else None
            parts.setdefault(key, []).append(row)
        for key, rows in parts.items():
            own = _of_part(group, rows)
            if key is None:
                kept.append(own)
                continue
            a, b, total = key
            at = torch.tensor(rows, device=x.device)
            part = Prediction(
                Lin.of(x[at]),
                Lin.of(out[at]),
                pred.kind,
                a,
                None if direction is None else Lin.of(direction[at]),
            )
            noise = None if span.noise is None else span.noise.of(rows)
            move = method.step(x[at], part, Span(own.moves, a, b, total, noise), own.state)
            moved, after_state = settle((move.mean, move.state))
            mean = mean.index_copy(0, at, moved.to(mean.dtype))
            std[rows] = float(move.std)
            for row in rows:
                over[row] = move.over
            kept.append(Group(own.rows, own.moves + (a != b), after_state))
    return Move(mean, std.to(x) if bool(std.any()) else 0.0, Groups(tuple(kept)), over)


def _moves(method: Sampler, group: Group, now: Level, after: Level) -> bool:
    """Return True if a sample is stepped: also for the second evaluation of a step."""
    if now.sigma == 0:
        return False
    return now != after or (method.evaluations > 1 and bool(group.state))


def _of_part(group: Group, rows: list[int]) -> Group:
    """The group of some of a group's rows."""
    if len(rows) == len(group.rows):
        return group
    places = torch.tensor([group.rows.index(row) for row in rows])

    def take(leaf: Any) -> Any:
        return leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return Group(tuple(rows), group.moves, map_tree(take, group.state))


def of_rows(level: Level, count: int | None = None) -> list[Level]:
    """The levels of the samples, as floats; count: their number, by default that of the sigmas."""
    count = len(level.sigma) if count is None else count
    columns = [_column(v, count) for v in level]
    return [Level(*values) for values in zip(*columns, strict=True)]


def _column(value: Any, count: int) -> list[float]:
    return cast(Any, value).tolist() if isinstance(value, Tensor) else [value] * count
