"""The reward interface, and the checks of what goes in and what comes out.

A reward is called as `reward(images, prompts)`: images [B, 3, H, W], RGB, floats in [0, 1];
prompts B texts; it returns scores [B], higher is better, float32 (float64 for float64 images).
Samples are independent: no statistic of the batch enters a score. `differentiable` promises that
the gradient of the scores with respect to the images is finite, and not zero almost everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sampler.core.errors import IncompleteError, SamplerError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

# Rounding and resampling overshoot a little; anything beyond is another range, most often [-1, 1].
RANGE = (-0.01, 1.01)

Dtype = Literal["float32", "bfloat16"]


class Prompt(str):
    """A prompt with metadata for rewards: the `meta_*` columns of its line, without the prefix."""

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt


class Scores(NamedTuple):
    """Scores [B] of a reward, and those of the parts of a composite one, by name."""

    total: Tensor
    parts: dict[str, Tensor]


class RewardBase:
    """Defaults of a reward; a strategy is a frozen dataclass that overrides what differs.

    batched: True for a reward that scores whole batches of a training, by `judge`.
    """

    name: str = ""
    reference: ClassVar[str] = ""
    batched: ClassVar[bool] = False

    @property
    def differentiable(self) -> bool:
        return True

    @property
    def reads_prompt(self) -> bool:
        """Return False for a reward of the pixels alone."""
        return True

    def check(self) -> None:
        """Load what the reward needs. Raises SamplerError (6) for missing files."""

    def judge(
        self, images: Tensor, prompts: Sequence[str], run: Path, update: int, show: bool
    ) -> list[float]:
        """Return the scores of a whole batch of a training, NaN for one without (see `Votes`)."""
        raise NotImplementedError

    def scored(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Return the scores together with those of the parts of a composite reward."""
        return Scores(self(images, prompts), {})

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return the scores [B] of the same images for several lists of B prompts.

        A reward with an encoder of images overrides it, to encode them once.
        """
        return [self(images, prompts) for prompts in texts]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [B]."""
        raise NotImplementedError


class PixelReward(RewardBase):
    """Base of the rewards that depend on the pixels alone."""

    @property
    def reads_prompt(self) -> bool:
        return False


class FunctionReward(RewardBase):
    """A function (images, prompts) -> scores as a reward; differentiable where it says so.

    A function with a third parameter, or one named `metadata`, is also given the metadata of the
    prompts, a list of B mappings (see `Prompt`).
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        name = getattr(function, "__name__", type(function).__name__)
        self.name = getattr(function, "name", "") or name

    @property
    def differentiable(self) -> bool:
        return bool(getattr(self.function, "differentiable", False))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        metadata = [dict(getattr(prompt, "metadata", {})) for prompt in prompts]
        try:
            arguments = _arguments(self.function, images, list(map(str, prompts)), metadata)
            return self.function(*arguments.args, **arguments.kwargs)
        except (SamplerError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise IncompleteError(
                f"The reward {self.name!r} failed with {type(error).__name__}: {first_line(error)}"
            ) from error


def _arguments(
    function: Callable[..., Any], images: Tensor, prompts: list[str], metadata: list[Any]
) -> inspect.BoundArguments:
    """Bind images, prompts and, where the function takes it, metadata to its parameters."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # builtins without one
        signature = inspect.signature(lambda images, prompts: None)
    named = signature.parameters.get("metadata")
    if named is not None and named.kind is not inspect.Parameter.POSITIONAL_ONLY:
        return signature.bind(images, prompts, metadata=metadata)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        p
        for p in signature.parameters.values()
        if p.kind in positional and p.default is inspect.Parameter.empty
    ]
    return signature.bind(images, prompts, *([metadata] if len(required) > 2 else []))


def as_reward(reward: Callable[..., Any]) -> RewardBase:
    """Return a reward, or a function as a reward."""
    return reward if isinstance(reward, RewardBase) else FunctionReward(reward)


class NonFiniteScore(SamplerError):
    """A reward returned NaN or infinity; the message names the samples and their prompts."""


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
