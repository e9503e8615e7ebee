"""PNG bytes, fast; and text chunks in and out, bounded.

With the extra `fast` (isal) a picture is filtered by numpy and compressed by isal; without, by
Pillow at level 1. Equal pixels and texts give equal bytes: nothing else is in the file.

    filter "average":  Filt(x) = Raw(x) − floor((Raw(left) + Raw(above)) / 2)   mod 256
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sampler.core.image_files import open_image
from sampler.errors import SamplerError

if TYPE_CHECKING:
    import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 2**20
_AVERAGE = 3


def encode(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """An RGB image [H, W, 3] of uint8 as PNG, with iTXt chunks."""
    try:
        from isal import isal_zlib
    except ModuleNotFoundError:
        return _with_pillow(pixels, texts)
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = isal_zlib.compress(_filtered(pixels), 1)
    chunks = [_chunk(b"IHDR", header), *(_text(k, v) for k, v in texts.items())]
    return b"".join([SIGNATURE, *chunks, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def decode(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    """The pixels [H, W, 3] and texts of an image file (PNG, JPEG, WebP), fully decoded.

    Raises SamplerError (2) for what is none of these, damaged, or beyond the limits.
    """
    import numpy as np
    from PIL import PngImagePlugin

    with open_image(data) as image:
        image.load()
        texts = {
            str(key)[:79]: str(value)
            for key, value in image.info.items()
            if isinstance(value, (str, PngImagePlugin.iTXt)) and len(value) <= MAX_TEXT
        }
        return np.asarray(image.convert("RGB")), texts


def is_whole(data: bytes) -> bool:
    """Whether every chunk of a PNG is there with a right checksum, and its pixels decode."""
    position = len(SIGNATURE)
    if not data.startswith(SIGNATURE):
        return False
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data) or zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            break
        position = end
    else:
        return False
    try:
        decode(data)
    except SamplerError:
        return False
    return True


def _filtered(pixels: np.ndarray) -> bytes:
    """Every row with filter "average", and the byte that says so before it."""
    import numpy as np

    height, width, _ = pixels.shape
    raw = np.ascontiguousarray(pixels).reshape(height, width * 3)
    sums = np.zeros((height, width * 3), np.uint16)
    sums[:, 3:] += raw[:, :-3]
    sums[1:] += raw[:-1]
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = _AVERAGE
    np.subtract(raw, (sums >> 1).astype(np.uint8), out=rows[:, 1:])
    return rows.tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(key: str, text: str) -> bytes:
    """An iTXt chunk: UTF-8, not compressed, no language."""
    return _chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + text.encode())


def _with_pillow(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info: Any = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()
