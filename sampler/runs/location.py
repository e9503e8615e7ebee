"""A run folder that is held: locked, and cleared of what killed writers left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from sampler.core import durable
from sampler.errors import RunFolderError, SamplerError, UsageError
from sampler.runs.folder import JOBS, PLAN, RUN, RunFolder
from sampler.runs.lock import NAME, Lock
from sampler.runs.store import LocalStore, Store, open_store

PLAN_WAIT = 600.0  # seconds that a further worker waits for the plan of the first


@dataclass(frozen=True)
class RunLocation:
    """Where a run is kept, and as whom: worker `rank` of `world`, of one group."""

    where: str
    rank: int = 0
    world: int = 1
    group: str | None = None
    fsync: bool = True


def location_for(where: str | Path, executor: str = "local", fsync: bool = True) -> RunLocation:
    """The place of this process. torchrun's ranks read who they are from the environment."""
    if executor != "torchrun":
        return RunLocation(str(where), fsync=fsync)
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise UsageError(
            "--executor torchrun reads RANK and WORLD_SIZE: start it with torchrun."
        ) from None
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_JOB_ID")  # fmt: skip
    group = ":".join(os.environ.get(name, "") for name in names)
    return RunLocation(str(where), rank, world, group, fsync)


@contextmanager
def open_locked(location: RunLocation) -> Iterator[Store]:
    """The store of a location, held against other runs. Raises SamplerError (4, 5)."""
    store = open_store(location.where, location.rank, location.fsync)
    if not isinstance(store, LocalStore):
        yield store
        return
    made = [folder for folder in (store.root, *store.root.parents) if not folder.exists()]
    durable.make_folder(store.root)
    with Lock(store.root, location.group):
        if location.group is None:
            durable.remove_temporaries(store.root)
        fresh = store.read(RUN) is None
        try:
            yield store
        except (SamplerError, ValueError):
            if fresh and location.rank == 0:
                _forget(store.root, made)
            raise


def _forget(root: Path, made: list[Path]) -> None:
    """Removes a run that failed before its first result, and the folders made for it."""
    if any(root.glob("journal*")):
        return
    for name in (RUN, PLAN, JOBS, NAME):
        (root / name).unlink(missing_ok=True)
    for folder in [root / "images", *made]:
        with suppress(OSError):
            folder.rmdir()


def wait_for_plan(store: Store) -> RunFolder:
    """The run that the first worker is planning."""
    deadline = time.monotonic() + PLAN_WAIT
    while store.read(RUN) is None:
        if time.monotonic() > deadline:
            raise RunFolderError(f"{store.where}: the first worker has not planned the run.")
        time.sleep(0.1)
    return RunFolder(store)


@dataclass
class StopFlag:
    """Whether to stop, and for which signal."""

    signal: int | None = None
    _flag: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> bool:
        return self._flag.is_set()

    def set(self, number: int) -> None:
        self.signal = number
        self._flag.set()


@contextmanager
def stop_on_signals(told: Callable[[str], None] = lambda text: None) -> Iterator[StopFlag]:
    """SIGINT and SIGTERM ask to stop after the current step; a second one ends the process."""
    stop = StopFlag()

    def handle(number: int, _: FrameType | None) -> None:
        if stop():
            os._exit(128 + number)
        stop.set(number)
        told("Stopping: what is computed will be written. Once more ends at once.")

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
