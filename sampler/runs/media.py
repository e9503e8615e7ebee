"""Videos and sounds as files, with the texts that images have.

Videos are animated WebP, or MP4 with the extra `video` (av); sounds are WAV with 16-bit samples.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sampler.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

WAV, MP4 = ".wav", ".mp4"
MAX_WAV = 2**32 - 2**20  # bytes; a RIFF file counts them in 32 bits
_CRF = "17"  # of H.264: visually lossless (FFmpeg's guide to H.264)


@dataclass(frozen=True)
class Sound:
    """Samples [channels, N] in -1..1 at `rate` samples per second."""

    samples: np.ndarray
    rate: int


def check_video(video: str) -> None:
    """Raise UsageError for a format of videos whose library is not installed."""
    if video == "mp4" and find_spec("av") is None:
        raise UsageError(
            "output.video = mp4 needs the extra video (pip install 'diffusion-sampler[video]'); "
            "install it, or use webp."
        )


def encode_webp(frames: np.ndarray, fps: int, quality: int | None, segments: Any) -> bytes:
    """Animated WebP of frames [F, H, W, 3 or 4] of uint8; without a quality, lossless.

    segments: EXIF and XMP as Pillow's options.
    """
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    how: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0,
        method=0 if quality is None else 4, **how, **segments,
    )  # fmt: skip
    return buffer.getvalue()


def encode_mp4(frames: np.ndarray, fps: int, texts: Mapping[str, str]) -> bytes:
    """MP4 with H.264 of frames [F, H, W, 3] of uint8, H and W even; texts are its metadata."""
    check_video("mp4")
    import av  # pyright: ignore[reportMissingImports]

    buffer, (_, height, width, _) = io.BytesIO(), frames.shape
    if height % 2 or width % 2:
        raise UsageError(
            f"A video of {width} x {height} pixels cannot be MP4: both sides must be even."
        )
    keep = {"movflags": "use_metadata_tags", "fflags": "bitexact"}
    with av.open(buffer, "w", format="mp4", options=keep) as file:  # pyright: ignore
        file.metadata.update(texts)
        stream = file.add_stream("libx264", rate=fps, options={"crf": _CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # equal frames give equal bytes
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def encode_wav(sound: Sound, texts: Mapping[str, str]) -> bytes:
    """WAV of 16-bit samples; texts are in its INFO list, one comment each.

    Raises UsageError for more than 4 GB.
    """
    import numpy as np

    values = np.clip(np.asarray(sound.samples, np.float64), -1, 1)
    data = np.ascontiguousarray(np.round(values * 32767).astype("<i2").T).tobytes()
    if len(data) > MAX_WAV:
        raise UsageError("A WAV file holds at most 4 GB; make a shorter sound.")
    channels = len(sound.samples)
    form = struct.pack(
        "<HHIIHH", 1, channels, sound.rate, sound.rate * channels * 2, 2 * channels, 16
    )
    notes = b"".join(
        _chunk(b"ICMT", f"{name}={text}".encode() + b"\0") for name, text in texts.items()
    )
    chunks = [_chunk(b"fmt ", form), _chunk(b"data", data)]
    chunks += [_chunk(b"LIST", b"INFO" + notes)] if notes else []
    return _chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def decode_wav(data: bytes) -> Sound:
    """The sound of a file of `encode_wav`, within half a 16-bit level."""
    import wave

    import numpy as np

    with wave.open(io.BytesIO(data)) as file:
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return Sound(values.reshape(-1, file.getnchannels()).T / 32767, file.getframerate())


def decode_webp(data: bytes) -> list[Any]:
    """Frames of an animated WebP as PIL images, with alpha where the file has it."""
    from PIL import ImageSequence

    from sampler.core.image_files import open_image

    with open_image(data) as file:
        return [frame.convert(file.mode) for frame in ImageSequence.Iterator(file)]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
