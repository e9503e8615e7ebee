"""Images that the pipeline's own safety checker flags: said so, and kept, blurred or not written.

Never blackened. A pipeline without a checker, as most are loaded, flags nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sampler.core.loop import Loop
from sampler.workers.batch_runner import Failed, Made, Outcome


def apply_safety_policy(
    engine: Loop, made: Made, policy: Literal["keep", "blur", "drop"]
) -> Outcome:
    """The image as it is, blurred, or as an outcome without image."""
    pipe: Any = engine.pipeline.pipe
    checker = getattr(pipe, "safety_checker", None)
    extractor = getattr(pipe, "feature_extractor", None)
    if checker is None or extractor is None or not _is_flagged(pipe, checker, extractor, made):
        return made
    if policy == "drop":
        return Failed("flagged", "safety_checker", "the safety checker flagged the image")
    pixels = made.pixels if policy == "keep" else _blurred(made.pixels)
    told = "kept" if policy == "keep" else "blurred"
    note = f"flagged by the safety checker, {told}"
    return replace(made, pixels=pixels, warnings=(*made.warnings, note))


def _is_flagged(pipe: Any, checker: Any, extractor: Any, made: Made) -> bool:
    from PIL import Image

    inputs = extractor([Image.fromarray(made.pixels)], return_tensors="pt").to(pipe.device)
    # The checker blackens what it is given: it gets a copy.
    copy = made.pixels[None].astype(np.float32) / 255
    _, flags = checker(images=copy, clip_input=inputs.pixel_values.to(pipe.dtype))
    return bool(flags[0])


def _blurred(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageFilter

    radius = max(pixels.shape[:2]) / 16
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
