"""Policy for images that the pipeline's safety checker flags: record, then keep, blur or drop.

No image is blackened. A pipeline without a checker, as most are loaded, flags nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sampler.core.loop import Loop
from sampler.runs.media import Sound
from sampler.workers.outcomes import Failure, GeneratedImage, Outcome


def apply_safety_policy(
    engine: Loop, image: GeneratedImage, policy: Literal["keep", "blur", "drop"]
) -> Outcome:
    """Check an image; if it is flagged, keep it with a warning, blur it, or return a failure."""
    if isinstance(image.pixels, Sound):
        return image
    frames = image.pixels if image.pixels.ndim == 4 else image.pixels[None]
    pipe: Any = engine.pipeline.pipe
    checker = getattr(pipe, "safety_checker", None)
    extractor = getattr(pipe, "feature_extractor", None)
    if checker is None or extractor is None or not _is_flagged(pipe, checker, extractor, frames):
        return image
    if policy == "drop":
        return Failure("flagged", "safety_checker", "the safety checker flagged the image")
    pixels = image.pixels
    if policy == "blur":
        pixels = np.stack([_blurred(frame) for frame in frames]).reshape(pixels.shape)
    note = f"flagged by the safety checker, {'kept' if policy == 'keep' else 'blurred'}"
    return replace(image, pixels=pixels, warnings=(*image.warnings, note))


def _is_flagged(pipe: Any, checker: Any, extractor: Any, frames: np.ndarray) -> bool:
    """Return True if the checker flags one of the frames [F, H, W, 3]."""
    from PIL import Image

    inputs = extractor([Image.fromarray(f) for f in frames], return_tensors="pt").to(pipe.device)
    # The checker blackens its input, so it gets a copy.
    copy = frames.astype(np.float32) / 255
    _, flags = checker(images=copy, clip_input=inputs.pixel_values.to(pipe.dtype))
    return any(map(bool, flags))


def _blurred(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageFilter

    radius = max(pixels.shape[:2]) / 16
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
