"""Storage of a run folder: a local or shared folder, or any fsspec URL.

Locally a file is written under a temporary name and renamed. On an object store it is one PUT of
its final name, and every commit to a journal is an object of its own.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from sampler.core import durable
from sampler.core.errors import SamplerError, StorageError, UsageError, first_line
from sampler.runs import journal

JournalLines = Iterable[Mapping[str, Any]]
CHUNK = 2**20


class Store(Protocol):
    """Storage interface of a run; names are relative, with forward slashes."""

    @property
    def where(self) -> str: ...
    def put(self, name: str, data: bytes) -> None: ...
    def commit(self, names: Iterable[str], lines: JournalLines) -> None: ...
    def new(self, name: str) -> Any: ...
    def read(self, name: str) -> bytes | None: ...
    def remove(self, name: str) -> None: ...
    def local(self, name: str) -> Path: ...
    def sizes(self) -> dict[str, int]: ...
    def journals(self) -> Iterator[bytes]: ...


class LocalStore:
    """Local folder. worker: owner of the journal; fsync=False leaves flushing to the system."""

    def __init__(self, root: Path, worker: int = 0, fsync: bool = True) -> None:
        self.root = root
        self._fsync = fsync
        self._journal = root / journal.journal_name(worker)
        self._folders: set[Path] = set()

    @property
    def where(self) -> str:
        return str(self.root)

    def put(self, name: str, data: bytes) -> None:
        """Write a file atomically. Raises StorageError."""
        path = self.root / name
        if path.parent not in self._folders:
            durable.make_folder(path.parent)
            self._folders.add(path.parent)
        durable.write_file(path, data, self._fsync)

    def commit(self, names: Iterable[str], lines: JournalLines) -> None:
        """Make written files durable, then append to the journal."""
        if self._fsync:
            for folder in sorted({(self.root / name).parent for name in names}):
                durable.sync_folder(folder)
        new = not self._journal.exists()
        journal.append(self._journal, lines, self._fsync)
        if new and self._fsync:
            durable.sync_folder(self.root)

    @contextmanager
    def new(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to stream into; it gets its name once it is complete."""
        durable.make_folder(self.root)
        temporary = self.root / f"{durable.TEMPORARY}{os.getpid()}-{name}"
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.root / name)
            durable.sync_folder(self.root)
        except OSError as error:
            raise durable.storage_error(error, self.root / name) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        """Remove a file if possible."""
        with suppress(OSError):
            (self.root / name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        return self.root / name

    def sizes(self) -> dict[str, int]:
        """Size of every image file; links are ignored."""
        found: dict[str, int] = {}
        _scan(self.root / "images", "images/", found)
        return found

    def journals(self) -> Iterator[bytes]:
        for path in sorted(self.root.glob(f"{journal.PREFIX}*.jsonl")):
            yield path.read_bytes()


class ObjectStore:
    """fsspec URL such as s3://bucket/run. worker: part of the names of journal objects."""

    def __init__(self, url: str, worker: str = "0") -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise UsageError(f"{self.url} cannot be opened: {first_line(error)}.") from None
        self._root = root.rstrip("/")
        self._worker = f"{worker}-{uuid.uuid4().hex[:8]}"
        self._segments = 0
        self._cache = tempfile.TemporaryDirectory(prefix="sampler-")

    @property
    def where(self) -> str:
        return self.url

    def put(self, name: str, data: bytes) -> None:
        """One PUT of the final name."""
        self._attempt(lambda: self._fs.pipe_file(f"{self._root}/{name}", data), name)

    def commit(self, names: Iterable[str], lines: JournalLines) -> None:
        """Write a journal segment, because objects cannot be appended to."""
        name = f"{journal.PREFIX}-{self._worker}-{self._segments:06d}.jsonl"
        self._segments += 1
        self.put(name, journal.encode(lines))

    @contextmanager
    def new(self, name: str) -> Iterator[BinaryIO]:
        local = self.local(name)
        local.unlink(missing_ok=True)
        with open(local, "wb") as stream:
            yield stream
        self._attempt(lambda: self._fs.put_file(str(local), f"{self._root}/{name}"), name)

    def read(self, name: str) -> bytes | None:
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        with suppress(OSError):
            self._fs.rm_file(f"{self._root}/{name}")

    def local(self, name: str) -> Path:
        """Local copy, fetched once."""
        path = Path(self._cache.name) / name
        if not path.exists() and (data := self.read(name)) is not None:
            path.write_bytes(data)
        return path

    def sizes(self) -> dict[str, int]:
        try:
            found = self._fs.find(f"{self._root}/images", detail=True)
        except FileNotFoundError:
            return {}
        skip = len(self._root) + 1
        return {path[skip:]: int(info["size"]) for path, info in found.items()}

    def journals(self) -> Iterator[bytes]:
        for path in sorted(self._fs.glob(f"{self._root}/{journal.PREFIX}*.jsonl")):
            yield self._fs.cat_file(path)

    def _attempt(self, action: Any, name: str) -> None:
        """Retry transient errors as on disk; raise StorageError for others."""
        try:
            durable.attempt(action, Path(name))
        except SamplerError as error:
            cause = error.__cause__
            raise StorageError(f"Cannot write {self.url}/{name}: {cause}.") from cause


def open_store(where: str | Path, worker: int | str = 0, fsync: bool = True) -> Store:
    """Open the store of a path or URL. A path may begin with ~, and may be a link to a folder."""
    if "://" in str(where) and not str(where).startswith("file://"):
        return ObjectStore(str(where), str(worker))
    root = Path(str(where).removeprefix("file://")).expanduser()
    if root.is_symlink():  # links inside of a run folder are refused
        root = root.resolve()
    return LocalStore(root, int(worker), fsync)


def _scan(folder: Path, prefix: str, found: dict[str, int]) -> None:
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _scan(folder / entry.name, f"{prefix}{entry.name}/", found)
            elif entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                found[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size
