"""Interface of a reward: an object, or a function of images and prompts.

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

from sampler.core.errors import IncompleteError, SamplerError, first_line

if TYPE_CHECKING:
    from torch import Tensor


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

    A function of the pixels alone has an attribute `reads_prompt = False`.

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

    @property
    def reads_prompt(self) -> bool:
        return bool(getattr(self.function, "reads_prompt", True))

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
