"""Which model it is: a hash over its weights and configurations, without loading it.

    SHA-256 over sorted (file name, size, SHA-256 of the content)

Hashes of files are cached by (path, size, mtime, inode). `fast` hashes the header, the size and
sixteen blocks of every safetensors file instead of all of it, and says so in the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sampler.errors import ModelError
from sampler.runs.jobs import Model

ENDINGS = (".safetensors", ".json", ".txt", ".model")
BLOCK = 2**20
BLOCKS = 16
MAX_HEADER = 100 * 2**20


# Families whose defaults are known without loading them, with the guidance scale of the stock
# pipeline (tested against diffusers). Of every other family the loaded model is asked.
SCALES = {
    "StableDiffusionPipeline": 7.5,
    "StableDiffusionXLPipeline": 5.0,
    "PixArtAlphaPipeline": 4.5,
    "PixArtSigmaPipeline": 4.5,
}
BUNDLED, BUNDLED_LCM, BUNDLED_STUDENT = "bundled", "bundled-lcm", "bundled-student"
BUNDLED_PARTS = {  # what they are made of, and what rules on them may use
    BUNDLED: ("pipeline", "weak", "classifier"),
    BUNDLED_LCM: ("pipeline", "lcm", "classifier"),
    BUNDLED_STUDENT: ("pipeline", "student", "classifier"),
}
BUNDLED_SCALE = 3.0  # the best prompt accuracy and Fréchet distance of the scales in its card


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
    """What a run has to know of a model that `sampler.load(path)` would load, without loading it.

    dtype: as configured; "auto" depends on the machine. Raises SamplerError (6) where it is none.
    """
    if path in (None, *BUNDLED_PARTS):
        from sampler.bundled import FOLDER

        label, given = path or BUNDLED, None if path == BUNDLED else path
        whole = fingerprint(FOLDER, fast, BUNDLED_PARTS[label])
        return Model(whole, dtype, label, native_size(FOLDER / "pipeline"), given)
    folder = find(path, revision)
    label = folder.name if folder == Path(path).expanduser() else path
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{path} is no diffusers pipeline: it has no model_index.json.")
    return Model(fingerprint(folder, fast), dtype, label, native_size(folder), path)


def find(path: str, revision: str | None = None) -> Path:
    """The folder of a model: as given, or in the local cache of the Hugging Face Hub."""
    folder = Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        raise ModelError(
            f"{path} is neither a folder here nor in the local cache; --download fetches it."
        ) from None


def defaults(path: str | None, revision: str | None = None) -> dict[str, Any] | None:
    """The sampler and the guidance of a model where a run says none, as `sampler.load` has them.

    None where only the loaded model can tell.
    """
    if path in (None, BUNDLED):
        return {"sampler": {"name": "ddim"}, "guidance": {"name": "cfg", "scale": BUNDLED_SCALE}}
    if path == BUNDLED_STUDENT:
        return {"sampler": {"name": "consistency"}, "guidance": {"name": "student"}}
    if path == BUNDLED_LCM or not _is_plain(folder := find(path, revision)):
        return None
    scale = SCALES[_class(folder)]
    return {"sampler": {"name": "ddim"}, "guidance": {"name": "cfg", "scale": scale}}


def _is_plain(folder: Path) -> bool:
    """Whether a model is of a family in SCALES, and no few-step student."""
    scheduler = str(_json(folder / "model_index.json").get("scheduler"))
    student = _config(folder / "unet").get("time_cond_proj_dim") is not None
    return _class(folder) in SCALES and "LCM" not in scheduler and not student


def _class(folder: Path) -> str:
    return str(_json(folder / "model_index.json").get("_class_name"))


def native_size(folder: Path) -> tuple[int, int] | None:
    """(height, width) of the images that the model makes unasked; None where configs do not say."""
    if _class(folder) not in SCALES:
        return None
    for name in ("unet", "transformer"):
        size = _config(folder / name).get("sample_size")
        if size:
            height, width = (size, size) if isinstance(size, int) else size
            factor = vae_factor(folder)
            return height * factor, width * factor
    return None


def vae_factor(folder: Path) -> int:
    """Pixels per latent, along one side."""
    config = _config(folder / "vae")
    blocks = config.get("block_out_channels") or config.get("decoder_block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else 8


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in sorted(os.walk(folder)):
        folders.sort()
        for name in sorted(names):
            if name.endswith(ENDINGS) and not name.startswith("."):
                yield Path(root) / name


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
