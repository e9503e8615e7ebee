"""Settings behind the options of `sampler generate` that take image files.

Everything is plain data, so it is stored in a configuration, a run folder and a record like any
other setting. Needs no torch: sizes are read from the headers of the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampler.config.options import Task
from sampler.core.errors import UsageError
from sampler.core.image_files import DEFAULT_STRENGTH, image_size
from sampler.samplers.methods import Problem, strategies

OPERATORS: Mapping[Task, dict[str, Any]] = {
    "inpaint": {"name": "inpaint"},
    "superres": {"name": "superres", "factor": 4},
    "deblur": {"name": "deblur", "kind": "gaussian", "size": 9, "sigma": 2.0},
    "denoise": {"name": "denoise"},
    "hdr": {"name": "hdr"},
    "jpeg": {"name": "jpeg", "quality": 20},
}


def restore_settings(
    task: Task | None, image: str | None, mask: str | None
) -> dict[str, tuple[str, Any]]:
    """Options {option: (configuration key, value)} of `generate --task`: the method reddiff.

    image: the degraded image; for superres the small one, the result is four times as large.
    mask: for inpaint, an image of the same size, white where it is to be filled.
    Raises UsageError for a missing file and for a mask of another size.
    """
    if task is None:
        if image is not None or mask is not None:
            raise UsageError(
                f"--image and --mask need --task: {', '.join(OPERATORS)}; or give --init-image and "
                "--mask."
            )
        return {}
    if image is None:
        raise UsageError(f"--task {task} needs --image FILE.")
    measured = operator_of(task, image, mask)
    width, height = image_size(image)
    factor = measured.get("factor", 1)
    _, spec, _ = strategies("reddiff", Problem(measured, str(Path(image).resolve())))
    return {
        "--task": ("sampler", spec),
        "--image width": ("run.width", width * factor),
        "--image height": ("run.height", height * factor),
    }


def operator_of(task: Task, image: str, mask: str | None) -> dict[str, Any]:
    """The operator of a task on an image file. Raises UsageError as `restore_settings`."""
    if (mask is None) == (task == "inpaint"):
        raise UsageError("--mask FILE goes with --task inpaint, and only with it.")
    size, found = image_size(image), dict(OPERATORS[task])
    if mask is not None:
        _check_mask(mask, "--image", size)
        found["mask"] = str(Path(mask).resolve())
    return found


def start_settings(
    init_image: str | None, mask: str | None, strength: float | None, restored: str | None
) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
    """Options of image to image and inpainting, and the tree of settings that are their defaults.

    init_image: file of the input `image` of the stock pipeline's call; mask: of its `mask_image`,
    white where the image is painted anew; strength: part of the noise levels, in (0, 1]; restored:
    value of --task or --image, None without them. The default strength of image to image is that of
    `Engine.generate`. Raises UsageError for options that do not go together, a missing file, and a
    mask of another size.
    """
    if init_image is None:
        if strength is not None:
            raise UsageError("--strength needs --init-image FILE.")
        return {}, {}
    if restored is not None:
        raise UsageError("--init-image goes without --task and --image, which restore an image.")
    if strength is not None and not 0 < strength <= 1:
        raise UsageError(f"--strength is {strength:g}; it must be above 0 and at most 1.")
    size = image_size(init_image)
    options: dict[str, tuple[str, Any]] = {"--init-image": ("inputs.image", _absolute(init_image))}
    if strength is not None:
        options["--strength"] = ("inputs.strength", strength)
    if mask is None:
        return options, {"inputs": {"strength": DEFAULT_STRENGTH}}
    _check_mask(mask, "--init-image", size)
    options["--mask"] = ("inputs.mask_image", _absolute(mask))
    return options, {}


def adapter_settings(
    control_images: list[str] | None, scales: list[float] | None, ip_images: list[str] | None
) -> dict[str, tuple[str, Any]]:
    """Options of the images of ControlNets and IP-Adapters, one each, in the adapters' order.

    scales: factors of the ControlNets' residuals, 0 or more. Raises UsageError for a missing file
    and for other scales.
    """
    found: dict[str, tuple[str, Any]] = {}
    if bad := [scale for scale in scales or () if not 0 <= scale < math.inf]:
        raise UsageError(f"--control-scale is {bad[0]:g}; it must be a number of 0 or more.")
    if scales:
        found["--control-scale"] = ("inputs.controlnet_conditioning_scale", _one(scales))
    for option, name, files in (
        ("--control-image", "control_image", control_images),
        ("--ip-image", "ip_adapter_image", ip_images),
    ):
        if files:
            for file in files:
                image_size(file)
            found[option] = (f"inputs.{name}", _one([_absolute(file) for file in files]))
    return found


def _one(values: list[Any]) -> Any:
    """The list, or its only item."""
    return values[0] if len(values) == 1 else values


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _check_mask(mask: str, option: str, size: tuple[int, int]) -> None:
    if image_size(mask) != size:
        wrong, right = (" x ".join(map(str, one)) for one in (image_size(mask), size))
        raise UsageError(f"--mask is {wrong} pixels, {option} {right}.")
