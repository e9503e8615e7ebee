"""Batches of samples, and the random numbers of a run.

An update is one collected batch of samples, numbered over all processes. Prompts, seeds, noise
and random choices are functions of (run seed, update, sample), so neither the number of processes
nor the size of the micro-batches changes a gradient, and resuming needs no random state.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """The samples of one update; this process has rank, rank + world, rank + 2·world, ...

    progress: share of the run's updates that are done, 0 to 1. numbers: place of each sample's
    prompt in the run's list.
    """

    update: int
    seed: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rank: int = 0
    world: int = 1
    progress: float = 0.0
    numbers: tuple[int, ...] = ()

    @property
    def groups(self) -> list[str]:
        """Group of each sample: equal for the same prompt with the same metadata."""
        return [group_of(prompt) for prompt in self.prompts]

    @property
    def rows(self) -> list[int]:
        """Numbers of the samples of this process."""
        return list(range(self.rank, len(self.prompts), self.world))

    def random(self, purpose: str) -> random.Random:
        """Return a generator that is equal in every process and on every resume of this update."""
        return random.Random(derived(self.seed, self.update, purpose))


def batch(
    prompts: Sequence[str],
    count: int,
    update: int,
    seed: int,
    group: int = 1,
    rank: int = 0,
    world: int = 1,
    progress: float = 0.0,
    places: Sequence[int] | None = None,
) -> Batch:
    """Return the batch of an update: `count` samples, `group` of them per prompt.

    places: of its prompts, one per group. None takes all prompts in turn; every pass over them has
    a random order of its own.
    """
    numbers = [place for place in places or () for _ in range(group)]
    slots = range(update * (count // group), (update + 1) * (count // group))
    for slot in slots if places is None else ():
        turn, position = divmod(slot, len(prompts))
        order = list(range(len(prompts)))
        random.Random(derived(seed, turn, "order")).shuffle(order)
        numbers += [order[position]] * group
    seeds = tuple(derived(seed, update, f"row {row}") for row in range(count))
    chosen = tuple(prompts[number] for number in numbers)
    return Batch(update, seed, chosen, seeds, rank, world, progress, tuple(numbers))


def group_of(prompt: str) -> str:
    """Return the text of a prompt, with its metadata where it has some.

    Rewards may depend on metadata, so that images of one text are comparable where both are equal.
    """
    metadata = getattr(prompt, "metadata", None)
    return f"{prompt} {json.dumps(metadata, sort_keys=True, default=repr)}" if metadata else prompt


def derived(seed: int, update: int, purpose: str) -> int:
    """Return a hash of all three arguments, in 0 .. 2^63 − 1."""
    digest = hashlib.sha256(f"{seed}:{update}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def split(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Split rows into consecutive parts whose sizes differ by one at most, longer ones first."""
    size, longer = divmod(len(rows), parts)
    ends = [(i + 1) * size + min(i + 1, longer) for i in range(parts)]
    return [list(rows[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def check_minibatches(name: str, minibatches: int, count: int, what: str = "images") -> None:
    """Raise ValueError where a process has too few images or pairs for its optimiser steps."""
    if minibatches > count:
        raise ValueError(
            f"{name}: minibatches = {minibatches} optimiser steps need at least one of the {what} "
            f"of a process each, and a batch has {count} of them; use a larger batch, or fewer "
            "minibatches."
        )


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Split rows into consecutive micro-batches of at most `size`."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
