"""Advantages from rewards: per prompt over recent updates, or within a group of images.

float64 on the CPU; every process computes the same from the gathered rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sampler.objectives import group_advantages

Buffers = dict[str, list[float]]


def per_prompt(
    prompts: Sequence[str], rewards: Sequence[float], buffers: Buffers, size: int, min_count: int
) -> tuple[list[float], list[float], Buffers]:
    """Return (advantages, 1/std, both per sample, new buffers).

        A = (r − mean)/(std + 1e-6),   population std

    Each prompt's rewards first join its ring buffer of `size`. With fewer than `min_count` values
    in it, mean and std are those of the batch, else those of the buffer. The text of a prompt is
    its key.
    """
    rewards_array = np.asarray(rewards, dtype=np.float64)
    buffers = {prompt: list(values) for prompt, values in buffers.items()}
    for prompt in dict.fromkeys(prompts):
        new = [float(r) for p, r in zip(prompts, rewards, strict=True) if p == prompt]
        buffers[prompt] = [*buffers.get(prompt, []), *new][-size:]
    advantages, inverse = [], []
    for prompt, reward in zip(prompts, rewards_array, strict=True):
        known = buffers[prompt]
        pool = rewards_array if len(known) < min_count else np.asarray(known)
        inverse.append(float(1 / (pool.std() + 1e-6)))
        advantages.append(float((reward - pool.mean()) / (pool.std() + 1e-6)))
    return advantages, inverse, buffers


def per_group(
    prompts: Sequence[str], rewards: Sequence[float]
) -> tuple[list[float], list[float], Buffers]:
    """Return (advantages, 1/std, both per sample, {}) within the images of each prompt.

    A = (r − mean of the prompt)/(std + 1e-4),   population std of the batch (Flow-GRPO)
    """
    advantages = group_advantages(prompts, rewards)
    scale = float(1 / (np.std(rewards) + 1e-4))
    return advantages.tolist(), [scale] * len(advantages), {}
