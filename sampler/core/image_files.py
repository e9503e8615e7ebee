"""Reading of image files within limits; imports no torch."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sampler.core.errors import SamplerError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
DEFAULT_STRENGTH = 0.6  # of image to image: part of the steps


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file after its EXIF rotation, read from the header."""
    from PIL import ExifTags

    with open_image(path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # a quarter turn
        return (file.height, file.width) if turned else file.size


def read_rgb(source: str | Path | bytes, name: str = "", on_white: bool = False) -> Image:
    """Read an image file, or the bytes of one, as RGB, rotated by its EXIF tag.

    on_white: put transparent images on white; else the colours below their alpha are read. Raises
    UsageError as `open_image`.
    """
    from PIL import ImageOps

    with open_image(source, name) as file:
        return as_rgb(ImageOps.exif_transpose(file), on_white)


def as_rgb(image: Image, on_white: bool = False) -> Image:
    """Convert an image to RGB; arguments as in `read_rgb`."""
    from PIL import Image as Pillow

    image = of_eight_bits(image)
    if not on_white or not has_alpha(image):
        return image.convert("RGB")
    white = Pillow.new("RGBA", image.size, "white")
    return Pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def of_eight_bits(image: Image) -> Image:
    """Scale grey values of 16 bits, which Pillow clips in conversions; return others unchanged."""
    from PIL import Image as Pillow

    if not image.mode.startswith("I"):
        return image
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    return Pillow.fromarray(np.round(values / 257).astype(np.uint8))


def has_alpha(image: Image) -> bool:
    """Return True for an image with an alpha channel or a transparent colour."""
    return "A" in image.getbands() or "transparency" in image.info


@contextmanager
def open_image(source: str | Path | bytes, name: str = "") -> Generator[Image, None, None]:
    """Open a PNG, JPEG or WebP file, or the bytes of one; nothing is decoded yet.

    name: of the file that the bytes are of, for errors. Raises UsageError for a file that is
    missing, is not such an image, or has more than 64 megapixels, and for damage that shows when
    the body of the `with` statement decodes it.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or ("The image" if isinstance(source, bytes) else str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise UsageError(f"{name}: {size}; at most 64 megapixels are read.")
            yield image
    except SamplerError:
        raise
    except UnidentifiedImageError:
        raise UsageError(f"{name}: it is not a readable image; use PNG, JPEG or WebP.") from None
    except OSError as error:
        reason = (error.strerror or f"it is not a readable image: {error}").lower()
        raise UsageError(f"{name}: {reason}.") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{name}: it is not a readable image: {problem}.") from None
