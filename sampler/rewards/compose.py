"""Composite rewards: weighted sum, target, cap, fixed standardisation, contrast of two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.registry.constraints import Nonnegative, Positive
from sampler.rewards.base import Prompt, RewardBase, Scores, as_reward
from sampler.rewards.scoring import scored

if TYPE_CHECKING:
    from torch import Tensor


class _Wrapper(RewardBase):
    """Base of the rewards that wrap one other reward."""

    reward: Any

    @property
    def differentiable(self) -> bool:
        return as_reward(self.reward).differentiable

    @property
    def reads_prompt(self) -> bool:
        return as_reward(self.reward).reads_prompt

    def check(self) -> None:
        as_reward(self.reward).check()

    def mapped(self, scores: Tensor) -> Tensor:
        """Return the scores [B] that the wrapper makes of those of the inner reward."""
        raise NotImplementedError

    def scored(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        total, parts = scored(self.reward, images, prompts)
        return Scores(self.mapped(total), parts)

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        return [self.mapped(scores) for scores in as_reward(self.reward).of_texts(images, texts)]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scored(images, prompts).total


@register("reward", "sum")
@dataclass(frozen=True)
class WeightedSum(RewardBase):
    """Σ w_k·r_k. Differentiable where all parts are; records of a training name each part's scores.

    rewards: the parts; weights: one per part, 1 each by default.
    """

    rewards: tuple[Any, ...] = field(metadata={"kind": "reward"})
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rewards, tuple) or not self.rewards:
            raise ValueError("sum: rewards must be a list of at least one reward.")
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"sum: {len(self.weights)} weights for {len(self.rewards)} rewards; give one each."
            )

    @property
    def differentiable(self) -> bool:
        return all(as_reward(r).differentiable for r in self.rewards)

    @property
    def reads_prompt(self) -> bool:
        return any(as_reward(r).reads_prompt for r in self.rewards)

    def check(self) -> None:
        for reward in self.rewards:
            as_reward(reward).check()

    def scored(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Return the sum, and the unweighted scores by name, numbered where a name repeats."""
        totals: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for name, reward in zip(self.part_weights, self.rewards, strict=True):
            total, inner = scored(reward, images, prompts)
            totals.append(total)
            parts |= {name: total, **{f"{name}_{key}": part for key, part in inner.items()}}
        return Scores(self._sum(totals), parts)

    @property
    def part_weights(self) -> dict[str, float]:
        """Weights of the parts by the names of their scores, numbered where a name repeats."""
        found: dict[str, float] = {}
        weights = self.weights or (1.0,) * len(self.rewards)
        for i, (reward, weight) in enumerate(zip(self.rewards, weights, strict=True)):
            name = as_reward(reward).name
            found[f"{name}_{i}" if name in found else name] = weight
        return found

    def of_texts(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
        found = [as_reward(reward).of_texts(images, texts) for reward in self.rewards]
        return [self._sum(totals) for totals in zip(*found, strict=True)]

    def _sum(self, totals: Sequence[Tensor]) -> Tensor:
        weights = self.weights or (1.0,) * len(totals)
        weighted = [weight * part for weight, part in zip(weights, totals, strict=True)]
        return sum(weighted[1:], weighted[0])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scored(images, prompts).total


@register("reward", "target")
@dataclass(frozen=True)
class Target(_Wrapper):
    """−|r − value|: rewards scores near a value.

    reward: the reward r; value: in its units.
    """

    reward: Any = field(metadata={"kind": "reward"})
    value: float

    def mapped(self, scores: Tensor) -> Tensor:
        return -(scores - self.value).abs()


@register("reward", "capped")
@dataclass(frozen=True)
class Capped(_Wrapper):
    """min(r, value): no gradient beyond the cap, a cheap guard against over-optimisation.

    reward: the reward r; value: in its units.
    """

    reward: Any = field(metadata={"kind": "reward"})
    value: float

    def mapped(self, scores: Tensor) -> Tensor:
        return scores.clamp(max=self.value)


@register("reward", "zscore")
@dataclass(frozen=True)
class ZScore(_Wrapper):
    """(r − mean) / std with fixed constants, never the batch's own statistics.

    reward: the reward r; mean, std: in its units, std > 0.
    """

    reward: Any = field(metadata={"kind": "reward"})
    mean: float
    std: Positive

    def mapped(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


@register("reward", "contrast")
@dataclass(frozen=True)
class Contrast(RewardBase):
    """(1 + k)·r(image, "positive. prompt") − r(image, "negative. prompt").

    A reward that reads the prompt, relative to another text, so that what it prefers whatever the
    prompt says cancels but for k. The image is encoded once.

    reward: the reward r. positive, negative: control words before the prompt; an empty one leaves
    the prompt as it is. k: weight of the plain reward; 0 is the difference of both.
    """

    reward: Any = field(metadata={"kind": "reward"})
    positive: str
    negative: str
    k: Nonnegative = 0.0

    reference: ClassVar[str] = "SRPO (Shen et al., 2025), arXiv:2509.06942, and its published code"

    def __post_init__(self) -> None:
        if self.positive == self.negative:
            raise ValueError(
                f"contrast: positive and negative are both {self.positive!r}, which leaves k times "
                "the reward; give two different texts."
            )
        inner = as_reward(self.reward)
        if not inner.reads_prompt:
            raise ValueError(
                f"contrast: {inner.name!r} reads no prompt, so that control words change nothing; "
                "use a reward of text and image, such as clip, pickscore, hpsv2 or image_reward."
            )

    @property
    def differentiable(self) -> bool:
        return as_reward(self.reward).differentiable

    def check(self) -> None:
        as_reward(self.reward).check()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = [[said(word, p) for p in prompts] for word in (self.positive, self.negative)]
        positive, negative = as_reward(self.reward).of_texts(images, texts)
        return (1 + self.k) * positive - negative


def said(word: str, prompt: str) -> str:
    """Return a prompt behind a control word, with its metadata."""
    return Prompt(f"{word}. {prompt}", getattr(prompt, "metadata", None)) if word else prompt
