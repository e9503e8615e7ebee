"""Stop requests: SIGINT and SIGTERM as a flag that workers poll, or SIGTERM as an exception."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopFlag:
    """Call it to poll. signal: number of the signal that set it."""

    signal: int | None = None
    _flag: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> bool:
        return self._flag.is_set()

    def set(self, number: int) -> None:
        """Request a stop."""
        self.signal = number
        self._flag.set()


@contextmanager
def stop_on_signals(on_signal: Callable[[str], None] = lambda text: None) -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a stop request; a second one ends the process.

    on_signal: receives a message for the user. Outside of the main thread no signal is handled.
    """
    stop = StopFlag()

    def handle(number: int, _: FrameType | None) -> None:
        if stop():
            os._exit(128 + number)
        stop.set(number)
        on_signal("Stopping after the current step; a second signal ends the process at once.")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {
        number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit(143) on SIGTERM, as Ctrl-C raises KeyboardInterrupt, within a context.

    Outside of the main thread no signal is handled.
    """

    def handle(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
