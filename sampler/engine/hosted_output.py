"""Outputs of stock pipelines as one value per image: PIL images, lists of frames, tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler.core.batch import Output
from sampler.core.errors import UsageError
from sampler.runs.media import Sound

log = logging.getLogger("sampler")


def first_value(out: Any) -> Any:
    """The images, frames or audio of a pipeline's output."""
    if isinstance(out, Mapping):  # a BaseOutput of diffusers
        return next(iter(out.values()))
    return out[0] if isinstance(out, tuple) else out


def note_further_values(name: str, out: Any) -> None:
    """Warn once of what a pipeline returns beside its images, such as sound or depth maps."""
    kept, *others = [*out] if isinstance(out, Mapping) else [""]
    found = [k for k in others if not k.endswith("_detected") and out[k] is not None]
    if found:
        _note(name, " and ".join(found), kept)


@cache
def _note(name: str, found: str, kept: str) -> None:
    log.warning("%s returns %s too, but only its %s are kept.", name, found, kept)


def converted(made: Any, output: Output, count: int) -> list[Any]:
    """One value per image. Videos as tensors are [3, F, H, W], as the engine's own.

    Raises UsageError for an output that is not one value per image, and for pixels where latents
    are asked for.
    """
    if isinstance(made, list) and len(made) == count and isinstance(made[0], list):
        made = [_frames(one, output) for one in made]
    if isinstance(made, (np.ndarray, Tensor)) and output == "pil" and _looks_like_images(made):
        made = _pictures(made)
    if isinstance(made, Tensor) and output == "tensor" and made.ndim == 5:
        made = made.transpose(1, 2)
    if isinstance(made, (np.ndarray, Tensor)) and output == "tensor":
        made = _as_tensors(made, count)
    first = made[0] if isinstance(made, list) and made else made
    if output == "latent" and not isinstance(first, Tensor):
        raise UsageError("The pipeline gives no latents but pixels; use output 'pil' or 'tensor'.")
    if isinstance(made, (list, np.ndarray, Tensor)) and len(made) == count:
        return [v.cpu() if isinstance(v, Tensor) else v for v in made]
    if isinstance(made, Tensor) and len(made) % count == 0:  # packed frames of one image
        return list(made.unflatten(0, (count, -1)).cpu())
    if isinstance(made, list) and made and len(made) % count == 0:  # albedo and shading of each
        each = len(made) // count
        return [made[k : k + each] for k in range(0, len(made), each)]
    kind = type(made).__name__
    raise UsageError(f"The pipeline returned {kind}, which is not one value for each image.")


def stored(made: Any, sample_rate: int | None) -> np.ndarray | Sound | None:
    """Convert one value to pixels of uint8: an image [H, W, C], a video [F, H, W, C]; or a sound.

    C is 4 where the pipeline gives alpha, else 3. sample_rate: of the sounds of an audio pipeline,
    None for images. None for other values.
    """
    if sample_rate is not None:
        values = np.asarray(made.float().cpu() if isinstance(made, Tensor) else made)
        return Sound(values.reshape(-1, values.shape[-1]), sample_rate)
    if hasattr(made, "convert"):
        return _pixels(made)
    if isinstance(made, list) and made and all(hasattr(frame, "convert") for frame in made):
        return np.stack([_pixels(frame) for frame in made])
    return None


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGBA" if image.mode == "RGBA" else "RGB"))


def _frames(frames: list[Any], output: Output) -> Any:
    return torch.stack(frames) if output != "pil" and isinstance(frames[0], Tensor) else frames


def _as_tensors(made: np.ndarray | Tensor, count: int) -> Tensor:
    """Pixels with their channels in front, and the frames of each image as a video [3, F, H, W]."""
    found = torch.as_tensor(made)
    if found.ndim > 3 and not isinstance(made, Tensor):
        found = found.movedim(-1, 1)
    if found.ndim == 4 and len(found) != count and len(found) % count == 0:
        found = found.unflatten(0, (count, -1)).transpose(1, 2)
    return found


def _looks_like_images(made: Any) -> bool:
    return made.ndim == 4 and 3 in (made.shape[1], made.shape[-1])


def _pictures(made: Any) -> list[Any]:
    from PIL import Image

    values = np.asarray(made.cpu() if isinstance(made, Tensor) else made, dtype=np.float32)
    values = values if values.shape[-1] == 3 else values.transpose(0, 2, 3, 1)
    return [Image.fromarray((one * 255).round().clip(0, 255).astype("uint8")) for one in values]
