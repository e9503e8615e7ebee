"""Inputs of hosted pipelines: images, folders of frames, videos and plain values; no torch.

A planned input is plain data, so that it can be recorded: a file is {"file": PATH, "sha256": ...},
a folder of frames {"folder": PATH, "sha256": ...}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import unquote, urlsplit

from sampler.core.errors import UsageError
from sampler.core.image_files import image_size, of_eight_bits, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
_NAMES = ("image", "mask", "video", "frame")
MAX_FRAMES = 10_000


def planned(name: str, value: Any) -> Any:
    """Return an input as plain data, with the hashes of files; objects in memory stay.

    Texts that name a file are files: "file:" URLs, names of images and videos, and existing folders
    for arguments that take images. Raises UsageError for a file that is missing, is not an image,
    or has other content than a recorded one.
    """
    if _names_files(value):
        where = value.get("file") or value.get("folder")
        found = planned(name, f"file:{where}")
        if value.get("sha256") not in (None, found["sha256"]):
            raise UsageError(
                f"input {name}: {where} is not the file that was recorded; its content has changed."
            )
        return found
    if isinstance(value, (list, tuple)):
        return _each(planned, name, value)
    if not isinstance(value, (str, Path)):
        return value
    path = _path(name, value)
    if path is None:
        return value
    if path.is_dir():
        return {"folder": str(path.resolve()), "sha256": _digest(*_frames(name, path))}
    if not path.is_file():
        raise UsageError(f"input {name}: {path}: no such file or directory.")
    if path.suffix.lower() not in VIDEOS:
        with open_image(path):
            pass
    return {"file": str(path.resolve()), "sha256": _digest(path)}


def _names_files(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return True for a planned file or folder."""
    return isinstance(value, Mapping) and ("file" in value or "folder" in value)


def _each(change: Callable[[str, Any], Any], name: str, values: Any) -> Any:
    """The list or tuple of changed values."""
    return type(values)([change(name, one) for one in values])


def input_size(value: Any) -> tuple[int, int] | None:
    """(height, width) of the image that an input names, as multiples of 8; None for other inputs.

    The first item of a list counts. None for a missing file, which `planned` reports. Raises
    UsageError for a file that is not an image.
    """
    path: Any = value
    while type(path) in (list, tuple) and path:
        path = path[0]
    if _names_files(path):
        path = path.get("file")
    elif type(path) is str:
        path = _path("image", path)
    if not isinstance(path, (str, Path)) or not Path(path).expanduser().is_file():
        return None
    if Path(path).suffix.lower() not in IMAGES:
        return None
    width, height = image_size(path)
    return max(height // 8, 1) * 8, max(width // 8, 1) * 8


def _path(name: str, value: str | Path) -> Path | None:
    """Path of an input that names a file; None for text."""
    if isinstance(value, Path):
        return value.expanduser()
    if value.startswith("file:"):
        return Path(unquote(urlsplit(value).path if "//" in value[:8] else value[5:])).expanduser()
    takes_files = any(part in name for part in _NAMES)
    if takes_files and value.startswith(("http:", "https:")):
        raise UsageError(
            f"input {name}: {value:.60} is on the network; download it and give a file."
        )
    path = Path(value).expanduser()
    if path.suffix.lower() in (*IMAGES, *VIDEOS) or (takes_files and path.is_dir()):
        return path
    return path if takes_files and "/" in value else None


def _frames(name: str, folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not 1 <= len(found) <= MAX_FRAMES:
        raise UsageError(
            f"input {name}: {folder} holds {len(found)} images (PNG, JPEG or WebP); it must hold 1 "
            f"to {MAX_FRAMES}."
        )
    return found


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest() if len(paths) > 1 else b"")
        digest.update(b"" if len(paths) > 1 else path.read_bytes())
    return digest.hexdigest()


def opened(name: str, value: Any, alpha: bool = False) -> Any:
    """Open the files of a planned input: an RGB image, or a list of frames.

    alpha: images have it, those that are given as such too; for networks that read it. Raises
    UsageError for content that has changed since it was planned.
    """
    if isinstance(value, (list, tuple)):
        return _each(partial(opened, alpha=alpha), name, value)
    if not _names_files(value):
        return value.convert("RGBA") if alpha and getattr(value, "mode", "") == "RGB" else value
    planned(name, value)
    if "folder" in value:
        return [_image(path) for path in _frames(name, Path(value["folder"]))]
    path = Path(value["file"])
    return list(_video(name, path)) if path.suffix.lower() in VIDEOS else _image(path, alpha)


def _image(path: Path, alpha: bool = False) -> Image:
    from PIL import ImageOps

    with open_image(path) as file:
        upright = of_eight_bits(ImageOps.exif_transpose(file))
        return upright.convert("RGBA" if alpha else "RGB")


def _video(name: str, path: Path) -> Iterator[Image]:
    if path.suffix.lower() == ".gif":
        from PIL import Image as pil
        from PIL import ImageSequence

        with pil.open(path, formats=("GIF",)) as file:
            yield from (frame.convert("RGB") for frame in ImageSequence.Iterator(file))
        return
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"input {name}: {path} is a video, which needs the package av; install it, or give a "
            "folder of frames."
        ) from None
    with av.open(str(path)) as container:  # pyright: ignore
        for number, frame in enumerate(container.decode(video=0)):  # pyright: ignore
            if number >= MAX_FRAMES:
                raise UsageError(f"input {name}: {path} has more than {MAX_FRAMES} frames.")
            yield frame.to_image()  # pyright: ignore
