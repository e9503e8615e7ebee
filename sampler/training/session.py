"""State shared by all trainers during one fine-tuning run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.errors import SamplerError
from sampler.core.trajectory import Run, begin, conditions
from sampler.engine import Engine
from sampler.evaluation.scorers import ImageScorer
from sampler.rewards.base import RewardBase, Scores
from sampler.rewards.scoring import NonFiniteScore, check_finite, score_parts
from sampler.training.batches import Batch
from sampler.types import Cond, Guidance, Sampler


class Trainable(Protocol):
    """Weights that a run trains.

    `parameters` by name, float32; `tensors` copies what a checkpoint holds, and `load` restores
    it. Between `disable` and `enable` the engine's network is the one that was given.
    """

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, tensors: dict[str, Tensor]) -> None: ...
    def disable(self) -> None: ...
    def enable(self) -> None: ...


@dataclass(frozen=True)
class Session:
    """Engine, reward, sampler and guidance rule of a fine-tuning run.

    steps: sampling steps; size: (height, width) in pixels; micro: samples per network evaluation;
    negative: negative prompt of all samples. gather: concatenates [b, ...] of all processes in
    the order of their ranks; rank, world: of this process, and how many there are. trainable: the
    weights that are trained. evals: scorers of evaluations besides the reward. out: the run folder.
    """

    engine: Engine
    reward: RewardBase | None
    method: Sampler
    rule: Guidance
    steps: int
    size: tuple[int, int]
    micro: int
    negative: str = ""
    gather: Callable[[Tensor], Tensor] = lambda value: value
    rank: int = 0
    world: int = 1
    trainable: Any = None
    evals: tuple[ImageScorer, ...] = ()
    out: Path | None = None

    @property
    def pipeline(self) -> PipelineAdapter:
        """The pipeline adapter of the engine."""
        return self.engine.pipeline

    def encode(self, prompts: Sequence[str]) -> tuple[Guidance, Cond]:
        """Encode B prompts for evaluations at single levels, and bind the guidance rule to them."""
        negative = [self.negative] * len(prompts)
        with torch.no_grad():
            return conditions(
                self.pipeline, prompts, negative, self.size, self.method, self.rule, levels=()
            )

    def begin(self, batch: Batch, rows: Sequence[int]) -> Run:
        """Return the start of some samples of a batch; only the text encoder is evaluated."""
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

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Return scores [B] in full precision, which may be NaN or infinite."""
        if self.reward is None:
            raise SamplerError("This trainer needs a reward, and the run has none.")
        with torch.autocast(images.device.type, enabled=False):
            return score_parts(self.reward, images, prompts, finite=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Return finite scores [B]; every process raises NonFiniteScore where one of them would.

        A collective operation: all processes have to call it equally often.
        """
        scores = self.scores(images, prompts)
        everywhere = self.gather(scores.total.detach().isfinite().all()[None])
        if not bool(everywhere.all()):
            name = self.reward.name if self.reward else ""
            check_finite(name, scores.total, prompts)
            raise NonFiniteScore(f"{name!r} is not finite in another process.")
        return scores

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the trained weights off for the time of a context."""
        self.trainable.disable()
        try:
            yield
        finally:
            self.trainable.enable()

    def network(self) -> Any:
        """Return the denoiser whose predictions are the network's own, without clipping of x0."""
        twin: Any = copy.copy(self.pipeline)  # shares the networks
        twin.predict = lambda x, out, level, model: twin.schedule.predict(x, out, level)
        return twin

    def decoder(self, clamp: str) -> Callable[[Tensor], Tensor]:
        """Return a decoder from latents to images in [0, 1].

        clamp: "hard", or "straight_through", whose gradient is 1 at clipped values.
        """
        if clamp == "hard":
            return self.pipeline.decode
        decode = self.pipeline.unclamped().decode

        def straight_through(latents: Tensor) -> Tensor:
            images = decode(latents)
            return images + (images.clamp(0, 1) - images).detach()

        return straight_through
