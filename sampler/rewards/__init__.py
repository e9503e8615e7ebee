"""Rewards: scores of images. A new one is a file here and a line below."""

from sampler.rewards import (
    classify,
    clip_scores,
    compose,
    detect,
    image_reward,
    jpeg,
    simple,
    votes,
)

__all__ = [
    "classify",
    "clip_scores",
    "compose",
    "detect",
    "image_reward",
    "jpeg",
    "simple",
    "votes",
]
