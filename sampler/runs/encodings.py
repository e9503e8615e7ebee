"""Image files in PNG, JPEG and WebP, videos and sounds, with the same texts in each.

PNG has them as text chunks. JPEG and WebP have the web-UI text in EXIF's UserComment, where web
UIs look for it, and the record in an XMP packet.
"""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from sampler.config.options import ImageFormat, VideoFormat
from sampler.core.errors import UsageError
from sampler.runs import media, png
from sampler.runs.media import Sound

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

log = logging.getLogger("sampler")
RECORD, PARAMETERS = "sampler", "parameters"  # names of the texts
SUFFIXES: Mapping[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
QUALITY = 95
FPS = 16  # of videos
MAX_SEGMENT = 65_000  # bytes of EXIF or XMP: a JPEG segment holds 65,533 with its header
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_PACKET = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:sampler="urn:diffusion-sampler"><sampler:record>{}</sampler:record></rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_PACKED = re.compile(r"<sampler:record>(.*?)</sampler:record>", re.DOTALL)


@dataclass(frozen=True)
class Encoding:
    """Format of image files. quality: 1 to 100, of JPEG and WebP; video, fps: of videos."""

    format: ImageFormat = "png"
    quality: int = QUALITY
    video: VideoFormat = "webp"
    fps: int = FPS

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.format]

    def suffix_of(self, made: np.ndarray | Sound) -> str:
        """Ending of the file of an image, a video [F, H, W, C] or a sound."""
        if isinstance(made, Sound):
            return media.WAV
        return self.suffix if made.ndim == 3 else f".{self.video}"

    def encode(self, pixels: np.ndarray | Sound, texts: Mapping[str, str]) -> bytes:
        """Encode an image [H, W, 3 or 4] of uint8, a video [F, H, W, 3 or 4] or a sound.

        Equal ones with equal texts give equal bytes. A text that no segment of a JPEG holds is left
        out; the run's journal has the record. JPEG and MP4 have no alpha: images are put on white,
        with a warning. Raises UsageError where a library is missing.
        """
        if isinstance(pixels, Sound):
            return media.encode_wav(pixels, texts)
        used = self.video if pixels.ndim == 4 else self.format
        if pixels.shape[-1] == 4 and used in ("jpeg", "mp4"):
            pixels = _on_white(pixels, used)
        if pixels.ndim == 4 and self.video == "mp4":
            return media.encode_mp4(pixels, self.fps, texts)
        if pixels.ndim == 4:
            quality = None if self.format == "png" else self.quality
            return media.encode_webp(pixels, self.fps, quality, _segments(texts))
        if self.format == "png":
            return png.encode(pixels, texts)
        from PIL import Image

        buffer = io.BytesIO()
        options: dict[str, Any] = {"subsampling": 0} if self.format == "jpeg" else {"method": 4}
        Image.fromarray(pixels).save(
            buffer, self.format, quality=self.quality, **_segments(texts), **options
        )
        return buffer.getvalue()


def _on_white(pixels: np.ndarray, name: str) -> np.ndarray:
    """RGB of RGBA pixels on white."""
    import numpy as np

    _note_alpha(name)
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


@cache
def _note_alpha(name: str) -> None:
    log.warning("%s has no alpha: these images are written on white; png and webp keep it.", name)


def media_size(made: np.ndarray | Sound) -> tuple[int, int]:
    """(height, width) of an image or a video; (0, 0) of a sound."""
    return (0, 0) if isinstance(made, Sound) else (made.shape[-3], made.shape[-2])


def encoding_of(path: str | PurePath) -> Encoding:
    """Encoding for a file name; PNG without an ending. Raises UsageError for others."""
    suffix = PurePath(path).suffix.lower().replace(".jpeg", ".jpg") or ".png"
    if suffix in (media.MP4, media.WAV):
        return Encoding(video="mp4")
    known: dict[str, ImageFormat] = {ending: name for name, ending in SUFFIXES.items()}
    if suffix not in known:
        raise UsageError(f"{path}: images are written as {', '.join(known)}.")
    return Encoding(known[suffix])


def decode(data: bytes, name: str = "") -> tuple[np.ndarray, dict[str, str]]:
    """Decode an image file into pixels [H, W, 3] and texts; name: of the file, for errors.

    Raises UsageError for other files, damaged ones, and those above the limits.
    """
    return png.decode(data, _texts_of, name)


def _segments(texts: Mapping[str, str]) -> dict[str, bytes]:
    """EXIF and XMP of the texts, as options of Pillow."""
    from PIL.Image import Exif

    found: dict[str, bytes] = {}
    if PARAMETERS in texts:
        exif = Exif()
        comment = _UNICODE + texts[PARAMETERS].encode("utf-16-be")
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
        found["exif"] = exif.tobytes()
    if RECORD in texts:
        found["xmp"] = _PACKET.format(html.escape(texts[RECORD], quote=False)).encode()
    return {name: data for name, data in found.items() if len(data) <= MAX_SEGMENT}


def _texts_of(image: Image) -> dict[str, str]:
    """Texts in the EXIF and XMP of an image."""
    found: dict[str, str] = {}
    packet = image.info.get("xmp", b"")
    if isinstance(packet, bytes) and len(packet) <= png.MAX_TEXT:
        record = _PACKED.search(packet.decode("utf-8", "replace"))
        found |= {RECORD: html.unescape(record[1])} if record else {}
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    is_text = isinstance(comment, bytes) and comment.startswith(_UNICODE)
    if is_text and len(comment) <= png.MAX_TEXT:
        found[PARAMETERS] = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return found
