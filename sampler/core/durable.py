"""Bytes on disk: a file is there whole or not at all, and stays there when the power goes.

Write: a new temporary file (O_EXCL) beside the final name, fsync, rename; the folder's fsync is
the caller's, once per batch. Transient errors are tried again; those that need a person become
a SamplerError with exit code 5 that names the path and the space that is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from sampler.errors import SamplerError, StorageError

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
    """Gives `data` the name `path`, atomically. Raises SamplerError (5)."""
    attempt(lambda: _write(path, data, fsync), path)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises SamplerError (5)."""

    def sync() -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    attempt(sync, folder)


def make_folder(folder: Path) -> None:
    """The folder and its parents. Raises SamplerError (5); a symbolic link is refused."""

    def make() -> None:
        os.makedirs(folder, exist_ok=True)
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            raise OSError(errno.ELOOP, "a symbolic link inside a run folder", str(folder))

    attempt(make, folder)


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
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
    """os.write until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def remove_temporaries(folder: Path) -> int:
    """Removes what writers left that were killed; returns how many files."""
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
    """The result of `action`; transient OSErrors are tried three times more, with back-off."""
    for retry in range(RETRIES + 1):
        try:
            return action()
        except OSError as error:
            if error.errno in _FATAL or retry == RETRIES:
                raise storage_error(error, path) from error
            time.sleep(FIRST_PAUSE * 2**retry)
    raise AssertionError("unreachable")


def storage_error(error: OSError, path: Path) -> SamplerError:
    """What could not be written, and the free space, as a SamplerError (5)."""
    try:
        probe = path if path.exists() else path.parent
        free = f"{shutil.disk_usage(probe).free / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    reason = (error.strerror or str(error)).lower()
    return StorageError(
        f"Cannot write {path}: {reason} ({free}). Nothing is lost; the same command goes on."
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
