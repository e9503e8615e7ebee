"""Identity of a model: a hash over its weights and configurations, without loading it.

    SHA-256 over sorted (file name, size, SHA-256 of the content)

Hashes of files are cached by (path, size, mtime, inode). `fast` hashes the header, the size and
sixteen blocks of every safetensors file instead of all of it, and says so in the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sampler.bundled import BUNDLED, BUNDLED_PARTS, FOLDER
from sampler.core.errors import ModelError, UsageError
from sampler.models.folder import INDEX, find, native_size
from sampler.models.lora_files import lora_file, parse_lora
from sampler.models.student_files import student_digest
from sampler.runs.jobs import Model

ENDINGS = (".safetensors", ".json", ".txt", ".model")
BLOCK = 2**20
BLOCKS = 16
MAX_HEADER = 100 * 2**20
# In the fingerprint of a model with LoRAs, or with a student: "files+lora:3f9a..."
LORA, STUDENT = "+lora", "+student"


def fingerprint(folder: Path, fast: bool = False, parts: tuple[str, ...] = ()) -> str:
    """The fingerprint of the files below a folder, or below these parts of it."""
    cache = _Cache()
    digest = hashlib.sha256(b"fast" if fast else b"full")
    roots = [folder / part for part in parts] or [folder]
    for path in (path for root in roots for path in _files(root)):
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        digest.update(f"{name}\n{size}\n{cache.hash(path, fast)}\n".encode())
    cache.save()
    return ("fast:" if fast else "files:") + digest.hexdigest()


def model_of(path: str | None, revision: str | None, dtype: str, fast: bool = False) -> Model:
    """Facts that a run needs of a model that `sampler.load(path)` would load, without loading it.

    dtype: as configured; "auto" depends on the machine. Raises SamplerError (6) where it is none.
    """
    if path in (None, *BUNDLED_PARTS):
        label, given = path or BUNDLED, None if path == BUNDLED else path
        whole = fingerprint(FOLDER, fast, BUNDLED_PARTS[label])
        return Model(whole, dtype, label, native_size(FOLDER / "pipeline"), given)
    folder = find(path, revision)
    label = folder.name if folder == Path(path).expanduser() else path
    if not (folder / INDEX).is_file():
        raise ModelError(f"{path} is no diffusers pipeline: it has no model_index.json.")
    return Model(fingerprint(folder, fast), dtype, label, native_size(folder), path)


def with_lora(model: Model, loras: Sequence[str], student: str | None = None) -> Model:
    """The model with LoRAs, or with a student, in its fingerprint. UsageError for both at once."""
    if student is not None:
        if loras:
            raise UsageError("--lora changes the model, --student stands in its place: drop one.")
        digest = hashlib.sha256(f"{model.fingerprint}\n{student_digest(student)}".encode())
        how, _, _ = model.fingerprint.partition(":")
        return replace(model, fingerprint=f"{how}{STUDENT}:{digest.hexdigest()}")
    if not loras:
        return model
    digest = hashlib.sha256(model.fingerprint.encode())
    for folder, weight in map(parse_lora, loras):
        content = hashlib.sha256(lora_file(Path(folder)).read_bytes()).hexdigest()
        digest.update(f"{content}:{weight!r}\n".encode())
    how, _, _ = model.fingerprint.partition(":")
    return replace(model, fingerprint=f"{how}{LORA}:{digest.hexdigest()}")


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in sorted(os.walk(folder)):
        folders.sort()
        for name in sorted(names):
            if name.endswith(ENDINGS) and not name.startswith("."):
                yield Path(root) / name


class _Cache:
    """Hashes of large files, kept between runs in the user's cache folder."""

    def __init__(self) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._path = Path(base) / "diffusion-sampler" / "hashes.json"
        self._known: dict[str, str] = {}
        self._changed = False
        with suppress(OSError, ValueError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = found if isinstance(found, dict) else {}

    def hash(self, path: Path, fast: bool) -> str:
        fast = fast and path.suffix == ".safetensors"
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}|{fast}"
        if key not in self._known:
            self._known[key] = _fast_hash(path, stat.st_size) if fast else _hash(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """Best effort: without a cache the next run only hashes again."""
        if not self._changed:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent)
            with open(handle, "w", encoding="utf-8") as stream:
                json.dump(dict(list(self._known.items())[-5000:]), stream)
            os.replace(temporary, self._path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _fast_hash(path: Path, size: int) -> str:
    """The header, and BLOCKS evenly spaced blocks."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(length, MAX_HEADER)))
        for k in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * k // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()
