"""Composite rewards: weighted sum, target, cap, fixed standardisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sampler.registry import register
from sampler.registry.constraints import Positive
from sampler.rewards.base import RewardBase, as_reward

if TYPE_CHECKING:
    from torch import Tensor


class _Wrapper(RewardBase):
    """Base of the rewards that wrap one other reward."""

    reward: Any

    @property
    def differentiable(self) -> bool:
        return as_reward(self.reward).differentiable

    def check(self) -> None:
        as_reward(self.reward).check()


@register("reward", "sum")
@dataclass(frozen=True)
class WeightedSum(RewardBase):
    """Σ w_k·r_k. Differentiable where all parts are; `parts` gives each part's own scores.

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

    def check(self) -> None:
        for reward in self.rewards:
            as_reward(reward).check()

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the unweighted scores [B] of each part by name, numbered where a name repeats."""
        found: dict[str, Tensor] = {}
        for i, reward in enumerate(self.rewards):
            name = as_reward(reward).name
            found[f"{name}_{i}" if name in found else name] = reward(images, prompts)
        return found

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = list(self.parts(images, prompts).values())
        weights = self.weights or (1.0,) * len(scores)
        total = weights[0] * scores[0]
        for weight, part in zip(weights[1:], scores[1:], strict=True):
            total = total + weight * part
        return total


@register("reward", "target")
@dataclass(frozen=True)
class Target(_Wrapper):
    """−|r − value|: rewards scores near a value.

    reward: the reward r; value: in its units.
    """

    reward: Any = field(metadata={"kind": "reward"})
    value: float

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(self.reward(images, prompts) - self.value).abs()


@register("reward", "capped")
@dataclass(frozen=True)
class Capped(_Wrapper):
    """min(r, value): no gradient beyond the cap, a cheap guard against over-optimisation.

    reward: the reward r; value: in its units.
    """

    reward: Any = field(metadata={"kind": "reward"})
    value: float

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts).clamp(max=self.value)


@register("reward", "zscore")
@dataclass(frozen=True)
class ZScore(_Wrapper):
    """(r − mean) / std with fixed constants, never the batch's own statistics.

    reward: the reward r; mean, std: in its units, std > 0.
    """

    reward: Any = field(metadata={"kind": "reward"})
    mean: float
    std: Positive

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.reward(images, prompts) - self.mean) / self.std
