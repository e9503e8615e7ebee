"""Image and mask of the rule `blend`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sampler.registry import suggestion

if TYPE_CHECKING:
    from torch import Tensor

WORD = {"word": "", "map": "attention", "threshold": 0.0}  # fields of a mask by a word


class Parts(NamedTuple):
    """A blend that is ready to run: x0 outside, and the mask or the columns of its word."""

    image: Tensor
    mask: Tensor | None
    columns: Sequence[Sequence[int]] = ()


def check_word(mask: Mapping[str, Any]) -> None:
    """Check the fields of a mask by a word. Raises ValueError."""
    if unknown := [key for key in mask if key not in WORD]:
        raise ValueError(
            f"blend: mask has no field {unknown[0]!r:.40}{suggestion(unknown[0], [*WORD])}."
        )
    found = {**WORD, **mask}
    if not isinstance(found["word"], str) or not found["word"].strip():
        raise ValueError("blend: mask needs a word of the prompt, such as {word: apple}.")
    if found["map"] not in ("attention", "grad"):
        raise ValueError(f"blend: map = {found['map']!r:.40} must be 'attention' or 'grad'.")
    if not isinstance(found["threshold"], (int, float)):
        raise ValueError(f"blend: threshold = {found['threshold']!r:.40} must be a number.")


def read(image: Any) -> Tensor:
    """Read an image as [1, 3, H, W] in [0, 1]."""
    from sampler.core.images import as_images

    return as_images(image)


def sized(images: Tensor, size: tuple[int, int], what: str) -> Tensor:
    """Images of the run's size. Raises ValueError for another one."""
    if tuple(images.shape[-2:]) != tuple(size):
        height, width = images.shape[-2:]
        raise ValueError(
            f"blend: the {what} is {width} x {height} pixels, the run {size[1]} x {size[0]}; give "
            f"one of that size, or width={width}, height={height}."
        )
    return images


def checked(parts: Parts, shape: Sequence[int], rows: int) -> Parts:
    """Parts that fit latents of a shape. Raises ValueError for others."""
    if tuple(parts.image.shape[1:]) != tuple(shape):
        raise ValueError(
            f"blend: the image has shape {tuple(parts.image.shape[1:])}, the model's x "
            f"{tuple(shape)}; for images and a latent model set space='image'."
        )
    for name, value in (("the image", parts.image), ("the mask", parts.mask)):
        if value is not None and len(value) not in (1, rows):
            raise ValueError(
                f"blend: {name} has {len(value)} rows for a batch of {rows}; give one row, or one "
                "per image of the batch."
            )
    mask = parts.mask
    if mask is not None and (
        mask.ndim != len(shape) + 1 or tuple(mask.shape[-2:]) != tuple(shape[-2:])
    ):
        raise ValueError(
            f"blend: the mask has shape {tuple(mask.shape)}, which does not cover latents "
            f"{tuple(shape)}; give [h, w] of that size, or set space='image'."
        )
    return parts
