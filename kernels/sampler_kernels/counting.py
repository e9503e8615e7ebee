"""Counts the launches of the Triton backend, for benchmarks and for tests on any machine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class CountedLaunch(NamedTuple):
    """One kernel launch, and the bytes of the tensors that it reads and writes once."""

    kernel: str
    read: int
    written: int


class Counting(NamedTuple):
    """Settings of launches in a context: `launches` receives them; dry: none is made."""

    launches: list[CountedLaunch] | None = None
    dry: bool = False


_counting: ContextVar[Counting | None] = ContextVar("sampler_kernels_counting", default=None)
counting = _counting.get
"""The counting of this context; None, the usual answer, outside `count_launches` and `dry_run`."""


@contextmanager
def count_launches() -> Generator[list[CountedLaunch]]:
    """Yield a list that receives every launch inside the context."""
    launches: list[CountedLaunch] = []
    token = _counting.set(Counting(launches, dry()))
    try:
        yield launches
    finally:
        _counting.reset(token)


@contextmanager
def dry_run() -> Generator[None]:
    """Let the Triton backend serve every device and launch nothing: it only counts.

    Results are zeros. For counting on machines without a GPU.
    """
    outer = counting()
    token = _counting.set(Counting(outer.launches if outer else None, dry=True))
    try:
        yield
    finally:
        _counting.reset(token)


def dry() -> bool:
    found = counting()
    return found is not None and found.dry


def record(kernel: str, read: int, written: int) -> None:
    found = counting()
    if found is not None and found.launches is not None:
        found.launches.append(CountedLaunch(kernel, read, written))
