"""The rows of an update, and the numbers that they are made of.

An update is one collected batch: `rows` images, numbered over all processes. Prompts, seeds,
noise and random choices are functions of (run seed, update, row), so neither the number of
processes nor the cut into micro-batches changes a gradient, and resuming needs no random state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """The rows of one update; this process has rank, rank + world, rank + 2·world, ..."""

    update: int
    seed: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> list[int]:
        """The numbers of this process's rows."""
        return list(range(self.rank, len(self.prompts), self.world))

    def random(self, purpose: str) -> random.Random:
        """A generator that is the same in every process and on every resume of this update."""
        return random.Random(derived(self.seed, self.update, purpose))


def batch(
    prompts: Sequence[str],
    count: int,
    update: int,
    seed: int,
    group: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Batch:
    """The batch of an update: `count` rows, `group` of them per prompt.

    The prompts are walked in a new random order on every pass.
    """
    chosen = []
    for slot in range(update * (count // group), (update + 1) * (count // group)):
        turn, place = divmod(slot, len(prompts))
        order = list(range(len(prompts)))
        random.Random(derived(seed, turn, "order")).shuffle(order)
        chosen += [prompts[order[place]]] * group
    seeds = tuple(derived(seed, update, f"row {row}") for row in range(count))
    return Batch(update, seed, tuple(chosen), seeds, rank, world)


def derived(seed: int, update: int, purpose: str) -> int:
    """A number in 0 .. 2^63 − 1 that depends on all three."""
    digest = hashlib.sha256(f"{seed}:{update}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def parts(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows in consecutive pieces of at most `size`."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
