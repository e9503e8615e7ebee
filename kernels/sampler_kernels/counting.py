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


_dry: ContextVar[bool] = ContextVar("sampler_kernels_dry", default=False)
_launches: ContextVar[list[CountedLaunch] | None] = ContextVar(
    "sampler_kernels_launches", default=None
)


@contextmanager
def count_launches() -> Generator[list[CountedLaunch]]:
    """Yield a list that receives every launch inside the context."""
    launches: list[CountedLaunch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


@contextmanager
def dry_run() -> Generator[None]:
    """Let the Triton backend serve every device and launch nothing: it only counts.

    Results are zeros. For counting on machines without a GPU.
    """
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)


def dry() -> bool:
    return _dry.get()


def record(kernel: str, read: int, written: int) -> None:
    launches = _launches.get()
    if launches is not None:
        launches.append(CountedLaunch(kernel, read, written))
