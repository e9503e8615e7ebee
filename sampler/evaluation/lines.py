"""Prompt lines of an evaluation: every prompt several times, with seeds of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from sampler.core.errors import SamplerError, UsageError
from sampler.runs.readers import RawLine
from sampler.types import MAX_SEED

_CHOSEN = ("n", "seed")  # columns that an evaluation sets itself


def seed_of(prompt: str, repeat: int, seed: int = 0) -> int:
    """Seed of a repeat of a prompt: the first 63 bits of SHA-256 of prompt, repeat and `seed`.

    It depends neither on the order of a prompt file nor on other prompts, so that every evaluation
    of a prompt uses the same noise.
    """
    digest = hashlib.sha256(f"{prompt}\n{repeat}\n{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def evaluation_lines(lines: Iterable[RawLine], repeats: int, seed: int = 0) -> list[RawLine]:
    """Repeat every line with its seeds, sorted by its cells: a shuffled file gives the same run.

    Raises UsageError for a line with a seed or a number of images of its own.
    """
    found: list[tuple[tuple[str, str], RawLine]] = []
    for raw in lines:
        cells: Any = raw.cells
        if isinstance(cells, SamplerError):
            raise cells
        for name in _CHOSEN:
            if cells.get(name) not in (None, ""):
                raise UsageError(
                    f"{raw.where}: {name}: an evaluation sets it itself; use --repeats and --seed."
                )
        prompt = str(cells.get("prompt", ""))
        kept = {name: value for name, value in cells.items() if name not in _CHOSEN}
        place = prompt, str(sorted(kept.items()))  # lines of one prompt by their other cells
        for repeat in range(repeats):
            own = {**kept, "seed": seed_of(prompt, repeat, seed)}
            found.append((place, raw._replace(cells=own)))
    return [raw for _, raw in sorted(found, key=lambda one: one[0])]
