"""Fast PNG encoding, and bounded reading of images and their text chunks.

With the extra `fast` (isal), numpy filters and isal compresses; without, Pillow at level 1. Equal
pixels and texts give equal bytes.

    filter "average":  Filt(x) = Raw(x) − floor((Raw(left) + Raw(above)) / 2)   mod 256
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sampler.core.image_files import as_rgb, open_image

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 2**20
_AVERAGE = 3


def encode(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """Encode an RGB or RGBA image [H, W, C] of uint8 as PNG, with iTXt chunks."""
    try:
        from isal import isal_zlib
    except ModuleNotFoundError:
        return _with_pillow(pixels, texts)
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 6, 0, 0, 0)
    data = isal_zlib.compress(_filtered(pixels), 1)
    chunks = [_chunk(b"IHDR", header), *(_text(k, v) for k, v in texts.items())]
    return b"".join([SIGNATURE, *chunks, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def decode(
    data: bytes,
    more_texts: Callable[[Image], dict[str, str]] = lambda image: {},
    name: str = "",
) -> tuple[np.ndarray, dict[str, str]]:
    """Decode an image file (PNG, JPEG, WebP) into pixels [H, W, 3] and texts.

    more_texts: reads those that are not in text chunks; name: of the file, for errors.
    Raises UsageError for other files, damaged ones, and those above the limits.
    """
    import numpy as np
    from PIL import PngImagePlugin

    with open_image(data, name) as image:
        image.load()
        texts = {
            str(key)[:79]: str(value)
            for key, value in image.info.items()
            if isinstance(value, (str, PngImagePlugin.iTXt)) and len(value) <= MAX_TEXT
        }
        return np.asarray(as_rgb(image)), {**texts, **more_texts(image)}


def _filtered(pixels: np.ndarray) -> bytes:
    """Rows with filter "average", each after its filter byte."""
    import numpy as np

    height, width, channels = pixels.shape
    raw = np.ascontiguousarray(pixels).reshape(height, width * channels)
    sums = np.zeros(raw.shape, np.uint16)
    sums[:, channels:] += raw[:, :-channels]
    sums[1:] += raw[:-1]
    rows = np.empty((height, 1 + raw.shape[1]), np.uint8)
    rows[:, 0] = _AVERAGE
    np.subtract(raw, (sums >> 1).astype(np.uint8), out=rows[:, 1:])
    return rows.tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(key: str, text: str) -> bytes:
    """iTXt chunk: UTF-8, uncompressed, no language."""
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
