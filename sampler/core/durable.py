"""Atomic and durable writes.

A write goes to a new temporary file (O_EXCL) beside the final name, then fsync and rename; the
caller syncs the folder, once per batch. Transient errors are retried; others become a StorageError
that names the path and the free space.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from sampler.core.errors import SamplerError, StorageError

T = TypeVar("T")

TEMPORARY = ".tmp-"
RETRIES = 3
FIRST_PAUSE = 0.05  # seconds, doubled each time
_FATAL = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOENT, errno.EISDIR,
}  # fmt: skip
_numbers = count()


def write_file(path: Path, data: bytes, fsync: bool = True) -> None:
    """Write a file atomically. Raises StorageError."""
    attempt(lambda: _write(path, data, fsync), path)


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of a folder. Raises StorageError."""

    def sync() -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    attempt(sync, folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises StorageError, also for a symbolic link."""

    def make() -> None:
        os.makedirs(folder, exist_ok=True)
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            raise OSError(errno.ELOOP, "a symbolic link inside a run folder", str(folder))

    attempt(make, folder)


@contextmanager
def write_folder(folder: Path) -> Generator[Path, None, None]:
    """Yields a temporary folder; at the end it is flushed and replaces `folder`.

    Raises StorageError (5). After an error inside, `folder` is unchanged.
    """
    written = folder.with_name(f"{TEMPORARY}{os.getpid()}-{next(_numbers)}")
    make_folder(written)
    try:
        yield written
        sync_folder(written)
        if folder.exists():
            shutil.rmtree(folder)
        attempt(lambda: os.replace(written, folder), folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    sync_folder(folder.parent)


def write_all(handle: int, data: bytes) -> None:
    """Call os.write until all of `data` is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def remove_temporaries(folder: Path) -> int:
    """Remove the temporary files of killed writers; return their number."""
    removed = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY):
                with suppress(OSError):
                    os.unlink(entry.path)
                    removed += 1
            elif entry.is_dir(follow_symlinks=False):
                removed += remove_temporaries(Path(entry.path))
    return removed


def attempt(action: Callable[[], T], path: Path) -> T:
    """Run `action`; retry transient OSErrors three times, with exponential back-off."""
    for retry in range(RETRIES + 1):
        try:
            return action()
        except OSError as error:
            if error.errno in _FATAL or retry == RETRIES:
                raise storage_error(error, path) from error
            time.sleep(FIRST_PAUSE * 2**retry)
    raise AssertionError("unreachable")


def storage_error(error: OSError, path: Path) -> SamplerError:
    """Build the StorageError of a failed write, with the free space."""
    try:
        probe = path if path.exists() else path.parent
        free = f"{shutil.disk_usage(probe).free / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    reason = (error.strerror or str(error)).lower()
    return StorageError(
        f"Cannot write {path}: {reason} ({free}). Finished images are kept; the same command "
        "resumes the run."
    )


def _write(path: Path, data: bytes, fsync: bool) -> None:
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{next(_numbers)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = os.open(temporary, flags, 0o644)
    try:
        try:
            write_all(handle, data)
            if fsync:
                os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
