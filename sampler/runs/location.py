"""Location of a run: its default folder, its lock, and the worker that opens it."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampler.core import durable
from sampler.core.errors import RunFolderError, SamplerError, StorageError, UsageError
from sampler.runs.folder import JOBS, PLAN, RUN, RunFolder
from sampler.runs.lock import NAME, Lock
from sampler.runs.names import slug
from sampler.runs.store import LocalStore, Store, open_store

PLAN_TIMEOUT = 600.0  # seconds that further workers wait for the plan of the first
DEFAULT_ROOT = Path("runs")


@dataclass(frozen=True)
class RunLocation:
    """Folder or URL of a run, and worker `rank` of `world` in one group that opens it."""

    where: str
    rank: int = 0
    world: int = 1
    group: str | None = None
    fsync: bool = True


def location_for(where: str | Path, executor: str = "local", fsync: bool = True) -> RunLocation:
    """Location for this process. Ranks of torchrun are read from the environment."""
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


def default_folder(
    prompt: str,
    plan_hash: str,
    root: Path = DEFAULT_ROOT,
    output: Mapping[str, Any] | None = None,
) -> Path:
    """Folder of a plan below `root`: the existing one, or a new one named by date, prompt and hash.

    Names hold 16 bits of the hash, so an existing folder is taken only if its run.json has the
    whole hash and the same output options (`output`, None for any), or if it has none yet.
    """
    name = f"{slug(prompt, 24)}-{plan_hash[:4]}"
    found = {folder: _facts(folder) for folder in sorted(root.glob(f"*-{name}*"), reverse=True)}
    for folder, facts in found.items():
        if facts and facts.get("plan") == plan_hash and output in (None, facts.get("output")):
            return folder
    new = Path(unused(root / f"{datetime.date.today().isoformat()}-{name}"))
    return next((folder for folder, facts in found.items() if facts is None), new)


def recorded_config(where: str) -> dict[str, Any]:
    """Configuration in the run.json of a folder or URL; empty if there is no readable one."""
    config = (_facts(where) or {}).get("config")
    return config if isinstance(config, dict) else {}


def _facts(where: str | Path) -> dict[str, Any] | None:
    """Content of run.json; None if there is no such file yet, {} for one that is damaged."""
    try:
        data = open_store(str(where)).read(RUN)
        facts = None if data is None else json.loads(data)
    except (OSError, ValueError):
        return {}
    return facts if facts is None or isinstance(facts, dict) else {}


def unused(folder: str | Path) -> str:
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    candidates = itertools.chain([str(folder)], (f"{folder}-{k}" for k in itertools.count(2)))
    return next(path for path in candidates if not Path(path).exists())


def check_writable(where: str) -> None:
    """Raise StorageError, before anything is computed, if no image can be written there."""
    if "://" in where:
        return
    folder = Path(where)
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir():
        raise StorageError(f"{above} is a file; give a folder for the images.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{above} is not writable.")


@contextmanager
def open_locked(location: RunLocation) -> Iterator[Store]:
    """Open the store of a location and lock it. Raises RunFolderError and StorageError.

    A run that fails before its first result is removed, with the folders created for it.
    """
    store = open_store(location.where, location.rank, location.fsync)
    if not isinstance(store, LocalStore):
        yield store
        return
    created = [folder for folder in (store.root, *store.root.parents) if not folder.exists()]
    durable.make_folder(store.root)
    with Lock(store.root, location.group):
        if location.group is None:
            durable.remove_temporaries(store.root)
        is_new = store.read(RUN) is None
        try:
            yield store
        except (SamplerError, ValueError):
            if is_new and location.rank == 0:
                _remove_unstarted(store.root, created)
            raise


def _remove_unstarted(root: Path, created: list[Path]) -> None:
    if any(root.glob("journal*")):
        return
    for name in (RUN, PLAN, JOBS, NAME):
        (root / name).unlink(missing_ok=True)
    for folder in [root / "images", *created]:
        with suppress(OSError):
            folder.rmdir()


def wait_for_plan(store: Store) -> RunFolder:
    """Wait until the first worker has planned the run, and open it. Raises RunFolderError."""
    deadline = time.monotonic() + PLAN_TIMEOUT
    while store.read(RUN) is None:
        if time.monotonic() > deadline:
            raise RunFolderError(f"{store.where}: the first worker has not planned the run.")
        time.sleep(0.1)
    return RunFolder(store)
