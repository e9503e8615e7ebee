"""Division of batches among workers by claim files in a shared folder, without messages.

Worker r takes the batches with b % world == r first, then those without a claim or with an expired
one. A claim is a file created with O_EXCL, and its owner renews it. Two workers that compute the
same batch do no harm, because names and bytes are equal.

The folder is removed by a worker that has found all batches done and whose own are on disk; one
that is late to notice creates it again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sampler.core import durable
from sampler.core.errors import StorageError
from sampler.runs.location import RunLocation

FOLDER = ".claims"
LEASE = 60.0  # seconds
POLL = 0.5


class Claims:
    """Claims of one worker; a context manager that renews them."""

    def __init__(self, root: Path, location: RunLocation, lease: float = LEASE) -> None:
        group = "".join(c if c.isalnum() else "-" for c in location.group or "run")[-60:]
        self._folder = root / FOLDER / group  # claims of an earlier start have another group
        self._rank, self._lease = location.rank, lease
        self._held: Path | None = None
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._renew, daemon=True, name="claims")

    def __enter__(self) -> Claims:
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def claim(self, batch: int) -> bool:
        """Claim a batch; False if another worker holds it."""
        path = self._folder / f"{batch:06d}"
        if self._expired(path):
            path.unlink(missing_ok=True)
        try:
            handle = self._create(path)
        except FileExistsError:
            return False
        except OSError as error:
            raise durable.storage_error(error, path) from error
        os.write(handle, str(self._rank).encode())
        os.close(handle)
        self._held = path
        return True

    def _create(self, path: Path) -> int:
        """Create a claim file, and its folder, which another worker may be removing."""
        for last in (False, False, True):
            try:
                durable.make_folder(self._folder)
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except (FileNotFoundError, StorageError):
                if last:
                    raise
        raise AssertionError("unreachable")

    def _expired(self, path: Path) -> bool:
        try:
            return time.time() - path.stat().st_mtime > self._lease
        except FileNotFoundError:
            return False

    def _renew(self) -> None:
        while not self._stop.wait(self._lease / 4):
            if (path := self._held) is not None:
                try:
                    os.utime(path)
                except OSError:
                    pass


def claimed_batches(
    location: RunLocation,
    batches: Collection[int],
    remaining: Callable[[], Collection[int]],
    stopped: Callable[[], bool],
    lease: float = LEASE,
) -> Iterator[int]:
    """Yield the batches for this worker to compute, until all of them are done by any worker.

    remaining: returns the batches that no journal has yet.
    """
    with Claims(Path(location.where), location, lease) as claims:
        mine: set[int] = set()
        for batch in [b for b in sorted(batches) if b % location.world == location.rank]:
            if not stopped() and claims.claim(batch):
                mine.add(batch)
                yield batch
        while not stopped() and (left := set(remaining()) - mine):
            taken = next((batch for batch in sorted(left) if claims.claim(batch)), None)
            if taken is None:
                time.sleep(min(POLL, lease / 4))
                continue
            mine.add(taken)
            if taken in remaining():  # else all were done, and the claims removed, since `left`
                yield taken


def remove_claims(location: RunLocation) -> None:
    """Remove all claims, once every batch is done and this worker's are on disk."""
    shutil.rmtree(Path(location.where) / FOLDER, ignore_errors=True)
