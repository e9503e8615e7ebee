"""Noise as a pure function of (seed, step, stream), without generator state.

Resuming, reordering, other batch sizes and recomputation under checkpointing draw the same numbers.
The first noise of a sample equals that of a stock diffusers pipeline with one CPU generator per
image; the noise of the steps comes from numpy's counter-based Philox.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sampler.core.brownian import Interval, increment
from sampler.types import Sampler, Span

INITIAL = -1

# The stream is part of the Philox key, so streams are independent.
STREAMS = {
    **{"step": 0, "start": 1, "reddiff": 2, "renoise": 3, "reward": 4, "cads": 5},
    **{"path": 6, "y": 7, "x": 8, "vble": 9},
}


@dataclass(frozen=True)
class Noise:
    """Standard normal noise for samples with these seeds (0 .. 2^63 − 1, one per sample)."""

    seeds: tuple[int, ...]

    def draw(self, index: int, like: Tensor, stream: str = "step") -> Tensor:
        """Draw noise [B, ...] for step `index` (INITIAL: the first noise), typed as `like`.

        Drawn per sample in float32 on the CPU, then converted. Raises ValueError where the number
        of seeds is not B.
        """
        if len(self.seeds) != like.shape[0]:
            raise ValueError(
                f"{len(self.seeds)} seeds for {like.shape[0]} samples; give one per sample."
            )
        shape = tuple(like.shape[1:])
        rows = torch.stack([_draw(seed, index, stream, shape) for seed in self.seeds])
        return rows.to(like)

    def of_move(
        self, index: int, like: Tensor, over: Interval | list[Interval | None] | None
    ) -> Tensor:
        """Draw noise [B, ...] for the move of step `index`, where `Move.over` says from.

        over: an interval of the Brownian paths of all samples, a list of one per sample, or None
        for numbers of this step alone.
        """
        intervals = over if isinstance(over, list) else [over] * len(self.seeds)
        alone = self.draw(index, like) if None in intervals else torch.empty_like(like)
        for row, (seed, interval) in enumerate(zip(self.seeds, intervals, strict=True)):
            if interval is not None:
                alone[row] = _on_path(seed, index, interval, tuple(like.shape[1:]))
        return alone


def _on_path(seed: int, index: int, over: Interval, shape: tuple[int, ...]) -> Tensor:
    found = increment(over, lambda node: _draw(seed, node, "path", shape))
    return _draw(seed, index, "step", shape) if found is None else found


@dataclass(frozen=True)
class StepNoise:
    """Noise of one step for a sampler with `draws`, called as `span.noise(stream, like)`."""

    noise: Noise
    index: int
    streams: tuple[str, ...]

    def __call__(self, stream: str, like: Tensor) -> Tensor:
        """Draw noise [B, ...] shaped and typed as `like`; KeyError for an undeclared stream."""
        if stream not in self.streams:
            raise KeyError(f"The stream {stream!r} is not among the sampler's draws.")
        return self.noise.draw(self.index, like, stream)

    def of(self, rows: Sequence[int]) -> StepNoise:
        """Return the noise of some of the samples."""
        return replace(self, noise=Noise(tuple(self.noise.seeds[row] for row in rows)))


def with_noise(span: Span, method: Sampler, seeds: Sequence[int]) -> Span:
    """Return the span as a sampler receives it: with noise of these seeds where it draws."""
    if not method.draws:
        return span
    return span._replace(noise=StepNoise(Noise(tuple(seeds)), span.index, method.draws))


def initial(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """First noise [B, *shape], float32 on the CPU: torch.randn with manual_seed(seed) each."""
    return Noise(tuple(seeds)).draw(INITIAL, torch.empty(len(seeds), *shape))


def _draw(seed: int, index: int, stream: str, shape: tuple[int, ...]) -> Tensor:
    if index == INITIAL:
        # with the leading 1, as a pipeline with one generator per image draws it
        return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[0]
    key = np.array([seed, (index << 8) | STREAMS[stream]], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.as_tensor(generator.standard_normal(shape, dtype=np.float32))
