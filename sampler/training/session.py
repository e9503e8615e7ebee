"""What a trainer works with: an engine whose network has a trainable adapter, a reward, a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampler.core.trajectory import Run, begin
from sampler.engine import Engine
from sampler.rewards.base import NonFiniteScore, check_finite, name_of, score
from sampler.training.batches import Batch
from sampler.types import Guidance, Sampler


@dataclass(frozen=True)
class Session:
    """Engine, reward, sampler and rule of a fine-tuning run.

    steps: of sampling; size: (height, width) in pixels; micro: rows per evaluation; negative: one
    text for all rows. gather: [b, ...] of this process to [sum of b, ...] of all, in order of rank.
    adapter: switches the trained weights on and off.
    """

    engine: Engine
    reward: Any
    method: Sampler
    rule: Guidance
    steps: int
    size: tuple[int, int]
    micro: int
    negative: str = ""
    gather: Callable[[Tensor], Tensor] = lambda value: value
    adapter: Any = None

    def begin(self, batch: Batch, rows: Sequence[int]) -> Run:
        """The first snapshot of these rows; nothing is evaluated but the text encoder."""
        return begin(
            self.engine,
            [batch.prompts[row] for row in rows],
            [self.negative] * len(rows),
            [batch.seeds[row] for row in rows],
            self.steps,
            self.size,
            self.method,
            self.rule,
        )

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] in full precision; they may not be finite."""
        with torch.autocast(images.device.type, enabled=False):
            return score(self.reward, images, prompts, finite=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Finite scores [B]; every process raises NonFiniteScore where one's are not finite.

        All processes have to call it equally often.
        """
        scores = self.scores(images, prompts)
        everywhere = self.gather(scores.detach().isfinite().all()[None])
        if not bool(everywhere.all()):
            check_finite(name_of(self.reward), scores, prompts)
            raise NonFiniteScore(f"{name_of(self.reward)!r} is not finite in another process.")
        return scores

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the one that was given: its adapter is off."""
        self.adapter.disable()
        try:
            yield
        finally:
            self.adapter.enable()

    def decoder(self, clamp: str) -> Callable[[Tensor], Tensor]:
        """Latents to images in [0, 1], clamped "hard", or "straight_through" (gradient 1)."""
        pipeline = self.engine.pipeline
        if clamp == "hard":
            return pipeline.decode
        twin: Any = copy.copy(pipeline)  # the same networks; only the last operation differs
        twin.pixels = _straight_through
        return twin.decode


def _straight_through(vae: Any, latents: Tensor) -> Tensor:
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
    return images + (images.clamp(0, 1) - images).detach()
