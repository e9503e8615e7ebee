"""Advantages and targets from the scores of groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def group_advantages(
    prompts: Sequence[str],
    rewards: ArrayLike,
    std: Literal["batch", "group", "none"] = "batch",
    eps: float = 1e-4,
    unbiased: bool = False,
    floor: float | None = None,
) -> Floats:
    """Advantages relative to the images of the same prompt, float64 [N].

        A = (r − mean_group)/(s + eps),   or   (r − mean_group)/max(s, floor)

    std: the deviation s, over the whole batch, over the group, or 1 ("none": no division).
    unbiased: divide by n − 1 in s (verl-omni, DanceGRPO); the default divides by n (Flow-GRPO,
    Flow-Factory). floor: a lower bound of s in place of `eps`. A group of one image has A = 0 with
    "group".

    Raises ValueError for an unknown `std`, and for rewards that are not one per prompt.

    Source: Flow-GRPO (Liu et al., 2025), arXiv:2505.05470, and its published code.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if std not in ("batch", "group", "none"):
        raise ValueError(f"group_advantages: std = {std!r} must be one of batch, group, none.")
    if values.shape != (len(prompts),):
        raise ValueError(
            f"group_advantages needs one reward per prompt: {len(prompts)} prompts, "
            f"rewards of shape {values.shape}."
        )
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)

    def deviation(part: Floats) -> float:
        enough = part.size > (1 if unbiased else 0)
        return float(part.std(ddof=int(unbiased))) if enough else 0.0

    advantages = np.empty_like(values)
    for group in range(int(groups.max(initial=-1)) + 1):
        chosen = groups == group
        centred = values[chosen] - values[chosen].mean()
        if std != "none":
            scale = deviation(values if std == "batch" else values[chosen])
            centred = centred / (scale + eps if floor is None else max(scale, floor))
        advantages[chosen] = centred
    return advantages


def gdpo_advantages(
    prompts: Sequence[str],
    rewards: Sequence[ArrayLike],
    weights: Sequence[float],
    floor: float = 1e-6,
) -> Floats:
    """Advantages of several rewards, each normalised in its group before they are summed, [N].

        A_k = (r_k − mean_group)/max(std_group, floor),   A = normalise_batch(Σ_k w_k·A_k)

    normalise_batch subtracts the mean of the batch and divides by max(std, floor).
    Raises ValueError unless there is one weight per reward.

    Source: GDPO as in Flow-Factory's `compute_gdpo`.
    """
    if len(rewards) != len(weights):
        raise ValueError(f"gdpo_advantages: {len(rewards)} rewards, {len(weights)} weights.")
    parts = (group_advantages(prompts, r, std="group", floor=floor) for r in rewards)
    total = np.sum([w * part for w, part in zip(weights, parts, strict=True)], axis=0)
    return (total - total.mean()) / max(float(total.std()), floor)


def optimality(
    advantages: Tensor | ArrayLike,
    max_advantage: float,
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all",
) -> Tensor:
    """Probability of optimality r in [0, 1] from advantages, elementwise.

        r = clip(A, −A_max, A_max)/(2·A_max) + 1/2

    mode: "positive_only" and "negative_only" set the other sign to A = 0, "one_only" sets positive
    advantages to 1 and others to 0, "binary" takes the sign. Arrays and lists are taken as tensors.
    Raises ValueError for an unknown mode.

    Source: DiffusionNFT (Zheng et al., 2025), arXiv:2509.16117, and its published code.
    """
    a = torch.as_tensor(advantages).clamp(-max_advantage, max_advantage)
    if mode == "positive_only":
        a = a.clamp(min=0)
    elif mode == "negative_only":
        a = a.clamp(max=0)
    elif mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif mode == "binary":
        a = a.sign()
    elif mode != "all":
        raise ValueError(
            f"optimality: mode = {mode!r} must be one of all, positive_only, negative_only, "
            "one_only, binary."
        )
    return (a / max_advantage / 2 + 0.5).clamp(0, 1)
