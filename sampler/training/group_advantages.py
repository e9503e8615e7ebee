"""Advantages within the images of a prompt, of the total reward or of the parts of a sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sampler.rewards.base import RewardBase

Combine = Literal["sum", "gdpo"]


def check_combination(
    trainer: str, combine: Combine, std: str, reward: RewardBase | None = None
) -> None:
    """Raise ValueError for "gdpo" with a deviation of the total, or a reward without parts."""
    if combine == "sum":
        return
    if std != "batch":
        raise ValueError(
            f"{trainer}: std = {std!r} divides advantages of the total, and advantages = 'gdpo' "
            "normalises each reward in its group; leave std out."
        )
    if reward is not None and len(weights_of(reward)) < 2:
        raise ValueError(
            f"{trainer}: advantages = 'gdpo' normalises the parts of the reward 'sum', of which it "
            f"needs at least two; {reward.name!r} is not one: use advantages = 'sum'."
        )


def weights_of(reward: RewardBase | None) -> dict[str, float]:
    """Return the weights of the parts of a sum by their names in the records, {} for others."""
    from sampler.rewards.compose import WeightedSum

    return reward.part_weights if isinstance(reward, WeightedSum) else {}


def flat_rows(
    combine: Combine,
    reward: RewardBase | None,
    prompts: Sequence[str],
    rewards: Sequence[float],
    parts: Mapping[str, Sequence[float]],
) -> list[bool]:
    """Return for each sample whether all samples of its prompt have equal scores.

    With "gdpo" these are the scores of every part of the sum.
    """
    scores = [rewards] if combine == "sum" else [parts[name] for name in weights_of(reward)]
    seen = defaultdict[str, set[tuple[float, ...]]](set)
    for prompt, *values in zip(prompts, *scores, strict=True):
        seen[prompt].add(tuple(values))
    return [len(seen[prompt]) == 1 for prompt in prompts]


def combined_advantages(
    combine: Combine,
    std: Literal["batch", "group", "none"],
    reward: RewardBase | None,
    prompts: Sequence[str],
    rewards: Sequence[float],
    parts: Mapping[str, Sequence[float]],
) -> NDArray[np.float64]:
    """Return advantages [N] as `group_advantages` or `gdpo_advantages` have them.

    parts: the scores of all samples by the names of the records.
    """
    from sampler.objectives import gdpo_advantages, group_advantages

    if combine == "sum":
        return group_advantages(prompts, rewards, std=std)
    weights = weights_of(reward)
    return gdpo_advantages(prompts, [parts[name] for name in weights], [*weights.values()])
