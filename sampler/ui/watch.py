"""Work in a thread, with its updates for the page."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sampler.ui.previews import Preview

T = TypeVar("T")


def watch(work: Callable[[Callable[[Preview], None]], T]) -> Iterator[Preview | T]:
    """Yield the previews that `work` shows, then its result. Raises what it raises."""
    updates: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            updates.put(work(updates.put))
        except BaseException as error:
            updates.put(error)

    threading.Thread(target=run, daemon=True).start()
    while isinstance(found := updates.get(), Preview):
        yield found
    if isinstance(found, BaseException):
        raise found
    yield found
