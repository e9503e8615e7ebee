"""Image restoration from files: the settings behind `sampler generate --task`.

Everything is plain data, so it is stored in a configuration, a run folder and a record like any
other setting. Needs no torch: sizes are read from the headers of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampler.config.options import Task
from sampler.core.errors import UsageError
from sampler.core.image_files import open_image

# RED-Diff in the latents of a pipeline: lr of the published examples; their lam of 0.25 costs the
# bundled model 3 to 6 dB (docs/samplers.md).
BASE = {"name": "reddiff", "space": "image", "lr": 0.25, "lam": 0.05}
OPERATORS: Mapping[Task, dict[str, Any]] = {
    "inpaint": {"name": "inpaint"},
    "superres": {"name": "superres", "factor": 4},
    "deblur": {"name": "deblur", "kind": "gaussian", "size": 9, "sigma": 2.0},
    "denoise": {"name": "denoise"},
    "hdr": {"name": "hdr"},
    "jpeg": {"name": "jpeg", "quality": 20},
}


def settings(task: Task | None, image: str | None, mask: str | None) -> dict[str, tuple[str, Any]]:
    """Options {option: (configuration key, value)} of a task on an image file.

    image: the degraded image; for superres the small one, the result is four times as large.
    mask: for inpaint, an image of the same size, white where it is to be filled.
    Raises UsageError for a missing file and for a mask of another size.
    """
    if task is None:
        if image is not None or mask is not None:
            raise UsageError(f"--image and --mask need --task: {', '.join(OPERATORS)}.")
        return {}
    if image is None:
        raise UsageError(f"--task {task} needs --image FILE.")
    if (mask is None) == (task == "inpaint"):
        raise UsageError("--mask FILE goes with --task inpaint, and only with it.")
    width, height = _size(image)
    operator = dict(OPERATORS[task])
    if mask is not None:
        if _size(mask) != (width, height):
            wrong = " x ".join(map(str, _size(mask)))
            raise UsageError(f"--mask is {wrong} pixels, --image {width} x {height}.")
        operator["mask"] = str(Path(mask).resolve())
    factor = operator.get("factor", 1)
    spec = {**BASE, "operator": operator, "y": str(Path(image).resolve())}
    return {
        "--task": ("sampler", spec),
        "--image width": ("run.width", width * factor),
        "--image height": ("run.height", height * factor),
    }


def _size(path: str) -> tuple[int, int]:
    """(width, height) of an image file after its EXIF rotation, read from the header."""
    from PIL import ExifTags

    with open_image(path) as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # a quarter turn
        return (file.height, file.width) if turned else file.size
