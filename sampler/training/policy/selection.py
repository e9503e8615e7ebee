"""Choices by rewards: images of a group, and prompts.

D3S: of the G images of a prompt the k with the greatest variance of advantages. The optimum is
    always i lowest and k − i highest values, so that k + 1 candidates suffice.
VADE: Thompson sampling. Of each prompt, p is the share of its images whose reward is above a
    threshold, with the posterior Beta(a, b); an update draws p of every prompt and takes the
    prompts with the largest p·(1 − p), the variance of a hit.

Source: D3S (Wang et al., 2025), arXiv:2509.22115; VADE (Hu et al., 2025), arXiv:2511.18902. The
constants are ours.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sampler.training.batches import derived

FLAT = 1e-3  # of the running spread: groups below it have equal rewards up to rounding
DECAY = 0.9  # of the running spread, and of the evidence on a prompt that is sampled
SLOW_DECAY = 0.99  # of the evidence on the other prompts
RECENT = 256  # rewards whose median is the threshold

State = dict[str, Any]


def kept_images(keep: int | None, size: int, progress: float) -> int:
    """Return k of `size` images; None grows from half of them to all over the run."""
    return max(2, round(size * (1 + progress) / 2)) if keep is None else keep


def widest(group: Sequence[int], values: Tensor, k: int) -> list[int]:
    """Return the k numbers of a group whose values have the greatest variance, in order.

    values: of all samples. Ties go to fewer low values.
    """
    ranked = sorted(group, key=lambda row: (float(values[row]), row))
    candidates = [[*ranked[:low], *ranked[len(ranked) - (k - low) :]] for low in range(k)]
    candidates.append(ranked[:k])
    return sorted(max(candidates, key=lambda rows: float(values[rows].double().var(correction=0))))


def flat_groups(
    groups: Sequence[Sequence[int]], rewards: Sequence[float], spread: float | None
) -> tuple[list[bool], float]:
    """Return for each group whether its rewards are equal up to rounding, and the next spread."""
    deviations = [statistics.pstdev(rewards[row] for row in group) for group in groups]
    mean = statistics.fmean(deviations)
    spread = mean if spread is None else DECAY * spread + (1 - DECAY) * mean
    return [d <= FLAT * spread for d in deviations], spread


def learned(state: State, prompts: Sequence[str], rewards: Sequence[float]) -> State:
    """Return the next "hits" and "recent" after the rewards of a batch.

    A hit is a reward above the median of the last `RECENT` rewards of all prompts, or equal to
    their maximum, so that rewards of 0 and 1 are hits where they are 1. (The median of each
    prompt's own rewards would give every prompt p = 1/2.) Evidence of earlier updates counts
    `DECAY` times as much for the prompts of the batch, and `SLOW_DECAY` times for others: with one
    decay for all, what is known of a prompt is lost while others are sampled.
    """
    recent = [*state["recent"], *rewards][-RECENT:]
    median, top = statistics.median(recent), max(recent)
    hits: dict[str, list[float]] = {}
    for prompt, counts in state["hits"].items():
        decay = DECAY if prompt in prompts else SLOW_DECAY
        hits[prompt] = [1 + decay * (n - 1) for n in counts]
    for prompt, reward in zip(prompts, rewards, strict=True):
        counts = hits.setdefault(prompt, [1.0, 1.0])
        counts[0 if reward > median or reward == top else 1] += 1
    return {"hits": hits, "recent": recent}


def informative(
    prompts: Sequence[str], count: int, hits: Mapping[str, Sequence[float]], seed: int, update: int
) -> list[int]:
    """Return the places of `count` prompts, the one with the largest drawn p·(1 − p) first."""
    generator = random.Random(derived(seed, update, "vade"))
    drawn = [generator.betavariate(*hits.get(prompt, (1.0, 1.0))) for prompt in prompts]
    ranked = sorted(range(len(prompts)), key=lambda i: drawn[i] * (1 - drawn[i]), reverse=True)
    return [ranked[i % len(ranked)] for i in range(count)]
