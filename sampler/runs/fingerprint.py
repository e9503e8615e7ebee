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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from sampler.bundled import BUNDLED, BUNDLED_FLOW, BUNDLED_PARTS, FOLDER
from sampler.config.model import ModelConfig, changed
from sampler.core.errors import UsageError
from sampler.models.controlnet import controlnet_name, controlnet_paths
from sampler.models.folder import native_size
from sampler.models.ip_adapter import IP_ADAPTER, ip_adapter_files
from sampler.models.lora_files import checked_until, lora_file, lora_pairs, parse_lora
from sampler.models.source import ModelSource, component_files, find_source
from sampler.models.student_files import student_digest
from sampler.runs.jobs import Model

ENDINGS = (".safetensors", ".json", ".txt", ".model")
BLOCK = 2**20
BLOCKS = 16
MAX_HEADER = 100 * 2**20


def fingerprint(folder: Path, fast: bool = False, parts: tuple[str, ...] = ()) -> str:
    """The fingerprint of the files below a folder, or below these parts of it."""
    roots = [folder / part for part in parts] or [folder]
    paths = (path for root in roots for path in _files(root))
    return _hashed(((path.relative_to(folder).as_posix(), path) for path in paths), fast)


def model_of(model: ModelConfig, fast: bool = False) -> Model:
    """Identity of the model that `sampler.load` would give, without loading it.

    Raises ModelError for a model that is missing, unsafe or incomplete, ValueError for options that
    have no effect on it, and UsageError for a LoRA beside a student.
    """
    if model.student is not None and model.lora:
        raise UsageError("--lora changes the model, --student stands in its place: drop one.")
    checked_until(model.lora_until, bool(model.lora), bool(model.controlnet or model.ip_adapter))
    path = model.path
    source = find_source(
        path, config=model.config, revision=model.revision, variant=model.variant, vae=model.vae
    )
    if path in (None, *BUNDLED_PARTS):
        label, given = path or BUNDLED, None if path == BUNDLED else path
        files = fingerprint(FOLDER, fast, BUNDLED_PARTS[label])
    else:
        given, one = path, source.single or source.folder
        label = one.name if source.single or one == Path(path).expanduser() else path
        files = _hashed(source.files(), fast)
    options = _options(model, source, fast)
    return Model(files, model.dtype, label, native_size(source.folder), given, options)


def pipeline_of(model: ModelConfig) -> str:
    """Class name of a model's pipeline, without loading it; raises as `model_of` does."""
    return find_source(model.path, config=model.config, revision=model.revision).pipeline


def _options(model: ModelConfig, source: ModelSource, fast: bool) -> dict[str, Any]:
    """Everything else that decides the pixels: hashes of other files, values of options."""
    values = {f.name for f in fields(model) if f.metadata["identity"] == "value"} - {"dtype"}
    found = {name: value for name, value in changed(model).items() if name in values}
    if model.path == BUNDLED_FLOW:
        found["levels"] = "flow"
    if model.variant is not None:
        found["variant"] = model.variant
    if source.vae is not None:
        found["vae"] = _hashed(source.vae_files(), fast)
    if model.weak is not None:
        weak = component_files(Path(model.weak).expanduser())
        found["weak"] = _hashed(((path.name, path) for path in weak), fast)
    if model.lora:
        cache = _Cache()
        found["lora"] = [[cache.hash(lora_file(Path(path).expanduser()), False), weight]
                         for path, weight in map(parse_lora, model.lora)]  # fmt: skip
    for folder in controlnet_paths(model.controlnet):
        controlnet_name(folder)
        named = [(path.name, path) for path in component_files(folder)]
        found.setdefault("controlnet", []).append(_hashed(named, fast))
    for path, weight in lora_pairs(model.ip_adapter, IP_ADAPTER):
        files = ip_adapter_files(path)
        encoder = component_files(files.encoder, "transformers")
        named = [("weights", files.weights), *((path.name, path) for path in encoder)]
        found.setdefault("ip_adapter", []).append([_hashed(named, fast), weight])
    if model.student is not None:
        found["student"] = student_digest(model.student)
    return found


def _hashed(files: Iterable[tuple[str, Path]], fast: bool) -> str:
    """Fingerprint of named files."""
    cache, digest = _Cache(), hashlib.sha256(b"fast" if fast else b"full")
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name}\n{size}\n{cache.hash(path, fast)}\n".encode())
    cache.save()
    return ("fast:" if fast else "files:") + digest.hexdigest()


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
