"""Calls of a reward, with checks of images and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sampler.core.errors import SamplerError, UsageError
from sampler.rewards.base import Scores, as_reward

if TYPE_CHECKING:
    from torch import Tensor

# Rounding and resampling overshoot a little; anything beyond is another range, most often [-1, 1].
RANGE = (-0.01, 1.01)


class NonFiniteScore(SamplerError):
    """A reward returned NaN or infinity; the message names the samples and their prompts."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = rows


def scored(reward: Callable[..., Any], images: Tensor, prompts: Sequence[str]) -> Scores:
    """Call a reward on its own copy of the images [B, 3, H, W].

    Raises SamplerError for anything but one score per image (a tensor, array or list), and for a
    differentiable reward whose scores have no gradient.
    """
    import torch

    reward = as_reward(reward)
    total, parts = reward.scored(images.clone(), list(prompts))
    scores = as_tensor(total)
    if scores is None or tuple(scores.shape) != (len(prompts),):
        shape = type(total).__name__ if scores is None else tuple(scores.shape)
        raise SamplerError(
            f"The reward {reward.name!r} must return one score per image, a tensor "
            f"[{len(prompts)}], not {shape}."
        )
    expected = reward.differentiable and images.requires_grad and torch.is_grad_enabled()
    if expected and not scores.requires_grad:
        raise UsageError(
            f"The reward {reward.name!r} is marked differentiable, but its scores have no "
            "gradient: compute them with torch, without detach(), item() or numpy()."
        )
    return Scores(scores.to(images.device, score_dtype(images)), parts)


def as_tensor(scores: Any) -> Tensor | None:
    """Return a tensor, array, or list of numbers or tensors, as a tensor; None for others."""
    import numpy as np
    import torch

    if isinstance(scores, torch.Tensor):
        return scores
    if not isinstance(scores, (list, tuple, np.ndarray)):
        return None
    try:
        if len(scores) and all(isinstance(one, torch.Tensor) for one in scores):
            return torch.stack(list(scores))
        return torch.as_tensor(np.asarray(scores, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError):
        return None


def score(
    reward: Callable[..., Any], images: Tensor, prompts: Sequence[str], finite: bool = True
) -> Tensor:
    """Return the scores [B] of images [B, 3, H, W] in [0, 1], checked.

    Raises ValueError for images of another shape or range, SamplerError for scores of another
    shape, and with `finite` NonFiniteScore for NaN or infinity.
    """
    return score_parts(reward, images, prompts, finite).total


def score_parts(
    reward: Callable[..., Any], images: Tensor, prompts: Sequence[str], finite: bool = True
) -> Scores:
    """Return what `score` returns, with the scores of the parts. Errors as there."""
    check_images(images, prompts)
    found = scored(reward, images, prompts)
    if finite:
        check_finite(as_reward(reward).name, found.total, prompts)
    return found


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> None:
    """Raise NonFiniteScore that names up to three samples and their prompts."""
    bad = (~scores.detach().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        shown = "; ".join(f"image {b} ({prompts[b]!r:.60})" for b in bad[:3])
        raise NonFiniteScore(f"The reward {name!r} is not finite for {shown}.", bad)


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
