"""What a reward is, and the one place that checks what goes in and what comes out.

A reward is called as `reward(images, prompts)`: images [B, 3, H, W], RGB, floats in [0, 1];
prompts B texts; it returns scores [B], higher is better, float32 (float64 for float64 images).
Rows are independent: no statistic of the batch enters a score. `differentiable` promises that the
gradient of the scores with respect to the images is finite and not zero almost everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sampler.errors import SamplerError

if TYPE_CHECKING:
    from torch import Tensor

# Rounding and resampling overshoot a little; anything beyond is another range, most often [-1, 1].
RANGE = (-0.01, 1.01)

Dtype = Literal["float32", "bfloat16"]


class RewardBase:
    """The defaults of a reward; a strategy is a frozen dataclass that overrides what differs."""

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""

    @property
    def differentiable(self) -> bool:
        return True

    def check(self) -> None:
        """Loads what the reward needs. Raises SamplerError (6) for files that are missing."""


class NonFiniteScore(SamplerError):
    """A reward answered NaN or infinity; the message names the rows and their prompts."""


def is_differentiable(reward: Any) -> bool:
    """Whether a reward promises gradients; a plain function promises nothing."""
    return bool(getattr(reward, "differentiable", False))


def score(
    reward: Callable[..., Any], images: Tensor, prompts: Sequence[str], finite: bool = True
) -> Tensor:
    """Scores [B] of images [B, 3, H, W] in [0, 1], checked; with `finite` for NaN as well.

    Raises ValueError for images that are no images or lie in another range, SamplerError for an
    answer of the wrong shape, and NonFiniteScore for scores that are not finite.
    """
    check_images(images, prompts)
    scores = reward(images, list(prompts))
    name = name_of(reward)
    if tuple(getattr(scores, "shape", ())) != (len(prompts),):
        shape = tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__
        raise SamplerError(
            f"The reward {name!r} must return one score per image, a tensor [{len(prompts)}], "
            f"not {shape}."
        )
    scores = scores.to(images.device, score_dtype(images))
    if finite:
        check_finite(name, scores, prompts)
    return scores


def name_of(reward: Any) -> str:
    """What messages call a reward."""
    return getattr(reward, "name", "") or getattr(reward, "__name__", type(reward).__name__)


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> None:
    """Raises NonFiniteScore that names the rows, of at most three, and their prompts."""
    bad = (~scores.detach().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        shown = "; ".join(f"row {b} ({prompts[b]!r:.60})" for b in bad[:3])
        raise NonFiniteScore(f"The reward {name!r} is not finite for {shown}.")


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError for anything but float images [B, 3, H, W] in [0, 1], B = len(prompts)."""
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
        raise ValueError(
            f"A reward takes images [B, 3, H, W] of at least 16 pixels, not {tuple(images.shape)}."
        )
    if not images.is_floating_point():
        raise ValueError(f"A reward takes float images in [0, 1], not {images.dtype}.")
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images; give one per image.")
    if not len(images):
        return
    low, high = (float(v) for v in images.detach().aminmax())
    if low < RANGE[0] or high > RANGE[1]:  # NaN passes: it is the score's to report
        raise ValueError(
            f"A reward takes images in [0, 1], and these lie in [{low:.3g}, {high:.3g}]; "
            "map [-1, 1] with x / 2 + 0.5, once."
        )


def score_dtype(images: Tensor) -> Any:
    """float32, or float64 for float64 images."""
    import torch

    return torch.float64 if images.dtype == torch.float64 else torch.float32
