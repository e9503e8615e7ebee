"""Seeds for the step noise of a run inside a stock pipeline."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from sampler.types import MAX_SEED

NOT_PASSED: Any = object()  # flow-matching pipelines call `step` without their generator


def step_seeds(generator: Any, x: Tensor) -> tuple[int, ...]:
    """Choose one seed per sample of the first x [B, ...] of a run.

    generator: one per image; one for all, then sample b has its seed + b; None for torch's default
    generator. Each is advanced, so that the next run draws other noise. A generator from which only
    the first noise was drawn gives its own seed, which is the engine's; a used one gives a hash of
    its state. NOT_PASSED: a hash of each sample, which depends on the seed of the first noise.
    """
    if generator is NOT_PASSED:
        return _hashed(x)
    if isinstance(generator, (list, tuple)):
        return tuple(_seed(one, x[:1]) for one in generator)
    if generator is None:
        first = int(torch.randint(MAX_SEED, ()))
    else:
        first = _seed(generator, x)
    return tuple((first + b) & MAX_SEED for b in range(len(x)))


def _seed(generator: torch.Generator, noise: Tensor) -> int:
    state, device = generator.get_state(), generator.device
    fresh = torch.Generator(device).manual_seed(generator.initial_seed())
    unused = torch.equal(state, fresh.get_state())
    if not unused:
        torch.randn(noise.numel(), generator=fresh, device=device, dtype=noise.dtype)
        unused = torch.equal(state, fresh.get_state())
    torch.rand((), generator=generator, device=device)
    return generator.initial_seed() & MAX_SEED if unused else _digest(state)


def _hashed(x: Tensor) -> tuple[int, ...]:
    """Hash every sample; equal samples are told apart by their order."""
    seeds = [_digest(sample) for sample in x.detach().float().cpu().contiguous()]
    seen: Counter[int] = Counter()
    for b, seed in enumerate(seeds):
        seeds[b] = (seed + seen[seed]) & MAX_SEED
        seen[seed] += 1
    return tuple(seeds)


def _digest(values: Tensor) -> int:
    data = values.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") & MAX_SEED
