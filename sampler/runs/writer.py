"""Encode and write images on threads, beside the computation.

At most two batches wait, so that memory stays bounded; the first error is raised at the next batch.
A batch is journalled once all of its images are on disk.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sampler.runs import journal
from sampler.runs.encodings import Encoding
from sampler.runs.media import Sound
from sampler.runs.store import Store

if TYPE_CHECKING:
    import numpy as np

DEPTH = 2  # batches


@dataclass(frozen=True)
class WriteItem:
    """One result: its journal line, and its image, if there is one."""

    line: dict[str, Any]
    pixels: np.ndarray | Sound | None = None
    texts: dict[str, str] | None = None
    encoding: Encoding = Encoding()


def failed_name(index: int) -> str:
    """File with the error of an image, for people."""
    return f"failed/{index:06d}.json"


class _PendingBatch:
    """Items that are journalled together, by the thread that finishes the last of them."""

    def __init__(self, items: Sequence[WriteItem]) -> None:
        self.left = len(items)
        self.lines: list[dict[str, Any] | None] = [None] * len(items)
        self.lock = threading.Lock()

    def finished(self, position: int, line: dict[str, Any]) -> bool:
        with self.lock:
            self.lines[position] = line
            self.left -= 1
            return self.left == 0


class ImageWriter:
    """Writer threads; a context manager that drains them. on_written: receives journal lines."""

    def __init__(
        self,
        store: Store,
        threads: int = 2,
        on_written: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    ) -> None:
        self._store, self._on_written = store, on_written
        self._slots = threading.BoundedSemaphore(DEPTH)
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._journal = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"writer-{k}")
            for k in range(max(1, threads))
        ]

    def __enter__(self) -> ImageWriter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(None)
        if kind is None:
            self._raise()

    def put(self, items: Sequence[WriteItem]) -> None:
        """Queue a batch; blocks while two are being written. Raises the first error of a writer."""
        if not items:
            return
        while not self._slots.acquire(timeout=0.5):
            self._raise()
        self._raise()
        batch = _PendingBatch(items)
        for position, item in enumerate(items):
            self._tasks.put((batch, position, item))

    def close(self, seconds: float | None) -> bool:
        """Wait until all is written, at most for `seconds`; False after a timeout."""
        end = None if seconds is None else time.monotonic() + seconds
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            batch, position, item = task
            try:
                if self._error is None and batch.finished(position, self._stored(item)):
                    self._commit(batch)
            except BaseException as error:  # raised in the thread that computes
                self._error = self._error or error

    def _stored(self, item: WriteItem) -> dict[str, Any]:
        line = item.line
        if item.pixels is not None:
            data = item.encoding.encode(item.pixels, item.texts or {})
            self._store.put(line["file"], data)
            digest = hashlib.sha256(data).hexdigest()
            return {**line, "sha256": digest, "bytes": len(data)}
        if line["status"] == "error":
            self._store.put(failed_name(line["index"]), journal.encode([line]))
        return line

    def _commit(self, batch: _PendingBatch) -> None:
        lines = [line for line in batch.lines if line is not None]
        with self._journal:
            self._store.commit([line["file"] for line in lines if "file" in line], lines)
        self._slots.release()
        if self._on_written is not None:
            self._on_written(lines)
