"""Rewards without a model: brightness, colourfulness, agreement with a named colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt, Le

from sampler.registry import register
from sampler.rewards.base import PixelReward, RewardBase
from sampler.rewards.scoring import score_dtype

if TYPE_CHECKING:
    from torch import Tensor

# The twelve background colours of the bundled model's captions, RGB 0 to 255; the position is the
# class of the classifier. The training images are composited on them
# (scripts/bundled/emoji_data.py).
COLOURS = {
    "white": (245, 245, 245),
    "black": (25, 25, 28),
    "red": (205, 50, 50),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 70),
    "green": (60, 160, 80),
    "blue": (50, 100, 210),
    "sky blue": (140, 205, 245),
    "purple": (130, 70, 180),
    "pink": (245, 160, 190),
    "brown": (125, 85, 55),
    "gray": (135, 140, 145),
}
_NAMED = re.compile(rf"\bon (?:an? )?({'|'.join(sorted(COLOURS, key=len, reverse=True))})\b")


@register("reward", "brightness")
@dataclass(frozen=True)
class Brightness(PixelReward):
    """Mean of all values of the image, 0 (black) to 1 (white)."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.to(score_dtype(images)).mean((1, 2, 3))


@register("reward", "colourfulness")
@dataclass(frozen=True)
class Colourfulness(PixelReward):
    """Colourfulness on values of 0 to 255: 0 is grey, above 100 is extreme.

        rg = R − G,   yb = (R + G)/2 − B
        M = sqrt(var rg + var yb) + 0.3·sqrt((mean rg)² + (mean yb)²)

    R, G and B are the channels; var and mean are over the pixels of an image.
    """

    reference: ClassVar[str] = "Measuring colourfulness (Hasler & Süsstrunk, 2003), eq. for M^(3)"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        red, green, blue = (images.to(score_dtype(images)) * 255).flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        variance = rg.var(1, correction=0) + yb.var(1, correction=0)
        square = rg.mean(1) ** 2 + yb.mean(1) ** 2
        # The small constant keeps the gradient of a grey image finite.
        return (variance + 1e-6).sqrt() + 0.3 * (square + 1e-6).sqrt()


@register("reward", "colour_agreement")
@dataclass(frozen=True)
class ColourAgreement(RewardBase):
    """Agreement of the image's border with the background colour named in the prompt.

        −mean |pixel − colour|₂ over the border of width `border`, in units of the RGB cube's side

    For captions such as "a fox on a sky blue background"; the twelve colours are those of the
    bundled model. 0 is exact, −√3 the farthest. Raises ValueError for a prompt without a colour.

    border: fraction of the shorter side; 0.125 is the margin of the bundled sprites.
    """

    border: Annotated[float, Gt(0), Le(0.5)] = 0.125

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        images = images.to(score_dtype(images))
        wanted = images.new_tensor([COLOURS[named_colour(p)] for p in prompts]) / 255
        square = (images - wanted[:, :, None, None]).square().sum(1)
        width = max(1, round(self.border * min(images.shape[2:])))
        inner = torch.zeros_like(square[0], dtype=torch.bool)
        inner[width:-width, width:-width] = True
        return -(square[:, ~inner] + 1e-12).sqrt().mean(1)


def named_colour(prompt: str) -> str:
    """Return the colour of "... on [a] {colour} [background]". Raises ValueError for none."""
    found = _NAMED.findall(prompt.lower())
    if not found:
        known = ", ".join(COLOURS)
        raise ValueError(
            f"The prompt {prompt!r:.80} names no background colour; say 'on a ... background' "
            f"with one of {known}."
        )
    return found[-1]
