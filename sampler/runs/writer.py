"""Images on disk: whole or not at all, never in place of another, with their record inside.

An image is encoded in memory, written to a new temporary file of the same folder, fsynced, and
then given its name. Equal images with equal records are equal bytes: there is no time in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.types import SamplerError

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "sampler"  # the key of the text chunk that holds the record
_NUMBERED = re.compile(r"(\d{6,})-[0-9a-f]{10}\.png$")


def canonical(record: Any) -> str:
    """JSON that is equal for equal records: sorted keys, no blanks, NFC text, finite numbers.

    Raises ValueError for NaN and infinity, TypeError for what JSON cannot hold.
    """
    text = json.dumps(
        record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return unicodedata.normalize("NFC", text)


def key_of(record: Any) -> str:
    """The first 20 hex digits of the SHA-256 of a record's canonical JSON."""
    return hashlib.sha256(canonical(record).encode()).hexdigest()[:20]


def file_name(index: int, key: str) -> str:
    """`000012-3f9a1c20d4.png`: the number of the image and the start of its key."""
    return f"{index:06d}-{key[:10]}.png"


def next_index(folder: Path) -> int:
    """One more than the highest number of the images in a folder; 0 where there are none."""
    if not folder.is_dir():
        return 0
    matches = (_NUMBERED.match(entry.name) for entry in os.scandir(folder))
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def encode_png(image: Image, record: Mapping[str, Any] | None = None) -> bytes:
    """An image as PNG bytes; the record goes into the iTXt chunk `sampler` as canonical JSON."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if record is not None:
        info.add_itxt(CHUNK, canonical(record))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, pnginfo=info)
    return buffer.getvalue()


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record inside a PNG, None without one. Raises SamplerError (2) for a file that is none.

    The text chunks of an image are read without decoding its pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
        return None if text is None else json.loads(text)
    except (OSError, UnidentifiedImageError, ValueError):
        raise SamplerError(f"{path} is no PNG with a readable record.", 2) from None


def write_new(path: Path, data: bytes) -> None:
    """Writes a file durably under a name that is free.

    After a crash or an error at any point there is either the whole file or none. Raises
    FileExistsError where the name is taken, SamplerError (5) for what the storage refuses.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, data)
        try:
            _rename_new(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        _sync_folder(path.parent)
    except FileExistsError:
        if path.parent.is_dir():
            raise
        raise SamplerError(f"{path.parent} is a file; give a folder for the images.", 5) from None
    except OSError as error:
        raise SamplerError(
            f"Cannot write {path}: {(error.strerror or str(error)).lower()}.", 5
        ) from error


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _rename_new(temporary: Path, path: Path) -> None:
    """Gives a file its name; FileExistsError if the name is taken, even by a racing process."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: check, then rename
        if path.exists():
            raise FileExistsError(path) from None
        temporary.rename(path)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
