"""Replays: launches that are known from values of the same structure.

The steps of a run build the same formulas over other tensors and other numbers, and so do all
batches. What their walks find is the same: which launches there are, and which tensor or number
goes where. Once a structure has come often, this is kept with a function that knows the structure
(`matching`), and the walks are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampler_kernels.lin import Lin
from sampler_kernels.matching import Match, Structure
from sampler_kernels.planning import MadeLaunch, ValuedScalars, events, set_values
from sampler_kernels.scalars import RowScalar
from sampler_kernels.triton_ops import Launch

# A replay costs about as much as it saves in so many uses.
OFTEN = 64
_MOST = 8  # replays of one key; the steps at the begin of a run have structures of their own


class PlacedLaunch(NamedTuple):
    """A launch, and the places of what it is called with."""

    launch: Launch
    xs: list[int]
    consts: list[int]
    table: int | None


class Replay(NamedTuple):
    """The launches behind values of one structure; places are in what `match` fetches, followed by
    what the launches write.

    given: (scalars, place of their values). sums: (place of a reduction, place of its partial
    sums). values: the places of the results.
    """

    match: Match
    steps: list[PlacedLaunch]
    given: list[tuple[list[int], int]]
    sums: list[tuple[int, int]]
    values: list[int]

    def run(self, found: tuple[Any, ...], scalars: Sequence[RowScalar]) -> list[Tensor]:
        """The values of formulas; scalars and reductions keep theirs, as after a walk."""
        made = list(found)
        for launch, xs, consts, table in self.steps:
            made += launch.run(
                tuple([made[k] for k in xs]),
                tuple([made[k] for k in consts]),
                None if table is None else made[table],
            )
        for places, out in self.given:
            set_values([scalars[k] for k in places], made[out])
        for place, out in self.sums:
            made[place].value = made[out]
        return [made[k] for k in self.values]


class Seen:
    """Structures seen under one key, which tells most of them apart at little cost."""

    __slots__ = ("count", "known")

    def __init__(self) -> None:
        self.count = 0
        self.known: list[Any] = []

    def is_due(self) -> bool:
        """Count a structure that was not known; True where it is worth knowing."""
        self.count += 1
        return self.count % OFTEN == 0

    def keep(self, known: Any) -> None:
        self.known = [known, *self.known[: _MOST - 1]]


_settled: dict[Any, Seen] = {}
_reduced: dict[Any, Seen] = {}


def is_possible() -> bool:
    """Return True where torch need not see what is computed."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def settle(
    lins: Sequence[Lin],
    scalars: Sequence[RowScalar],
    dtype: torch.dtype,
    compute: Callable[[], list[Tensor]],
) -> list[Tensor]:
    """The values of formulas, with those of scalars: replayed where they are known, or computed."""
    seen = _seen(_settled, (dtype, len(scalars), *[lin.op for lin in lins]))
    for replay in seen.known:
        found = replay.match(lins, scalars)
        if found is not None:
            return replay.run(found, scalars)
    if not seen.is_due():
        return compute()
    structure, happened = Structure(lins, scalars), list[MadeLaunch | ValuedScalars]()
    token = events.set(happened)
    try:
        values = compute()
    finally:
        events.reset(token)
    replay = _replay_of(structure, scalars, happened, values)
    if replay is not None:
        seen.keep(replay)
    return values


def is_reducible(lins: Sequence[Lin], axes: Any) -> bool:
    """Return True for formulas of which `gram` is known to be the kernel's over these axes."""
    seen = _seen(_reduced, (axes, *[lin.op for lin in lins]))
    for match in seen.known:
        if match(lins, ()) is not None:
            return True
    return False


def note_reducible(lins: Sequence[Lin], axes: Any) -> None:
    """Take note of formulas of which it was found to be."""
    seen = _seen(_reduced, (axes, *[lin.op for lin in lins]))
    if seen.is_due():
        structure = Structure(lins, ())
        if structure.complete:
            seen.keep(structure.function())


def _seen(store: dict[Any, Seen], key: Any) -> Seen:
    seen = store.get(key)
    if seen is None:
        seen = store[key] = Seen()
    return seen


def _replay_of(
    structure: Structure,
    scalars: Sequence[RowScalar],
    happened: Sequence[MadeLaunch | ValuedScalars],
    values: Sequence[Tensor],
) -> Replay | None:
    """The replay of what has happened; None where something else than launches was computed."""
    places = dict(structure.places)
    count = len(places)
    steps: list[PlacedLaunch] = []
    given: list[tuple[list[int], int]] = []
    own = {id(scalar): k for k, scalar in enumerate(scalars)}
    try:
        for event in happened:
            if isinstance(event, ValuedScalars):
                given.append(([own[id(s)] for s in event.scalars], places[id(event.out)]))
                continue
            table = None if event.table is None else places[id(event.table)]
            xs = [places[id(x)] for x in event.xs]
            met: dict[int, int] = {}
            consts: list[int] = []
            if len(event.numbers) != event.consts:  # of an operator's program
                return None
            for node in event.numbers:
                position = met[id(node)] = met.get(id(node), -1) + 1
                consts.append(places[id(node), position])
            steps.append(PlacedLaunch(event.launch, xs, consts, table))
            for out in event.outs:
                places[id(out)] = count
                count += 1
        results = [places[id(value)] for value in values]
    except KeyError:
        return None
    if not structure.complete:
        return None
    sums = [
        (place, places[id(s.value)]) for s, place in structure.reductions if id(s.value) in places
    ]
    return Replay(structure.function(), steps, given, sums, results)
