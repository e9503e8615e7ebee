"""Lock of a run folder: `flock` on the file `.lock`, whose body names the owner.

The kernel releases the lock with the process, so on one host it is never stale. Across hosts, where
`flock` may not work, a lock without a heartbeat for 60 s is stale. The workers of one run share the
lock by naming the same group.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from sampler.core.durable import attempt, write_all
from sampler.core.errors import RunFolderError, SamplerError

NAME = ".lock"
STALE = 60.0  # seconds without heartbeat, on another host
BEAT = 10.0


class Lock:
    """Lock of a folder; a context manager. group: name that the workers of one run share."""

    def __init__(self, folder: Path, group: str | None = None) -> None:
        self._path = folder / NAME
        self._group = group or uuid.uuid4().hex
        self._shared = group is not None
        self._handle = -1
        self._stop = threading.Event()

    def __enter__(self) -> Lock:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = attempt(lambda: os.open(self._path, flags, 0o644), self._path)
        try:
            self._take()
        except BaseException:
            os.close(self._handle)
            raise
        threading.Thread(target=self._beat, daemon=True, name="lock-heartbeat").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if not self._shared and self._path.exists():
            os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def _take(self) -> None:
        kind = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(self._body()) from None
        except OSError:
            pass  # a file system without flock: the body decides
        body = self._body()
        other = body.get("host") not in (None, socket.gethostname())
        fresh = time.time() - os.fstat(self._handle).st_mtime < STALE
        ours = self._shared and body.get("group") == self._group
        if body and fresh and not ours and (other or self._held_by_group(body)):
            raise self._in_use(body)
        if not ours:
            start = {"pid": os.getpid(), "host": socket.gethostname(), "group": self._group}
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            write_all(self._handle, json.dumps(start).encode())

    def _held_by_group(self, body: dict[str, Any]) -> bool:
        """Check for a process of another group on this host that still shares the lock."""
        return self._shared and _alive(body.get("pid"))

    def _body(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
            return found if isinstance(found, dict) else {}
        except ValueError:
            return {}

    def _in_use(self, body: dict[str, Any]) -> SamplerError:
        who = f"process {body.get('pid', '?')} on {body.get('host', 'this host')}"
        return RunFolderError(f"{self._path.parent} is in use by {who}; wait for it or stop it.")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self._handle)
            except OSError:
                return


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
