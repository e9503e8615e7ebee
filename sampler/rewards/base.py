"""The reward interface, and the checks of what goes in and what comes out.

A reward is called as `reward(images, prompts)`: images [B, 3, H, W], RGB, floats in [0, 1];
prompts B texts; it returns scores [B], higher is better, float32 (float64 for float64 images).
Samples are independent: no statistic of the batch enters a score. `differentiable` promises that
the gradient of the scores with respect to the images is finite, and not zero almost everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sampler.core.errors import SamplerError

if TYPE_CHECKING:
    from torch import Tensor

# Rounding and resampling overshoot a little; anything beyond is another range, most often [-1, 1].
RANGE = (-0.01, 1.01)

Dtype = Literal["float32", "bfloat16"]


class RewardBase:
    """Defaults of a reward; a strategy is a frozen dataclass that overrides what differs."""

    name: str = ""
    reference: ClassVar[str] = ""

    @property
    def differentiable(self) -> bool:
        return True

    def check(self) -> None:
        """Load what the reward needs. Raises SamplerError (6) for missing files."""

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores [B] of the parts of a composite reward, by name."""
        return {}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [B]."""
        raise NotImplementedError


class FunctionReward(RewardBase):
    """A function (images, prompts) -> scores as a reward; differentiable where it says so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        name = getattr(function, "__name__", type(function).__name__)
        self.name = getattr(function, "name", "") or name

    @property
    def differentiable(self) -> bool:
        return bool(getattr(self.function, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        return self.function(images, prompts)


def as_reward(reward: Callable[..., Any]) -> RewardBase:
    """Return a reward, or a function as a reward."""
    return reward if isinstance(reward, RewardBase) else FunctionReward(reward)


class NonFiniteScore(SamplerError):
    """A reward returned NaN or infinity; the message names the samples and their prompts."""


def score(
    reward: Callable[..., Any], images: Tensor, prompts: Sequence[str], finite: bool = True
) -> Tensor:
    """Return the scores [B] of images [B, 3, H, W] in [0, 1], checked.

    Raises ValueError for images of another shape or range, SamplerError for scores of another
    shape, and with `finite` NonFiniteScore for NaN or infinity.
    """
    reward = as_reward(reward)
    check_images(images, prompts)
    scores = reward(images, list(prompts))
    if tuple(getattr(scores, "shape", ())) != (len(prompts),):
        shape = tuple(scores.shape) if hasattr(scores, "shape") else type(scores).__name__
        raise SamplerError(
            f"The reward {reward.name!r} must return one score per image, a tensor "
            f"[{len(prompts)}], not {shape}."
        )
    scores = scores.to(images.device, score_dtype(images))
    if finite:
        check_finite(reward.name, scores, prompts)
    return scores


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> None:
    """Raise NonFiniteScore that names up to three samples and their prompts."""
    bad = (~scores.detach().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        shown = "; ".join(f"image {b} ({prompts[b]!r:.60})" for b in bad[:3])
        raise NonFiniteScore(f"The reward {name!r} is not finite for {shown}.")


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError for anything but float images [B, 3, H, W] in [0, 1], B = len(prompts)."""
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
    """Return float32, or float64 for float64 images."""
    import torch

    return torch.float64 if images.dtype == torch.float64 else torch.float32
