"""Base of the trainers that match clean latents of their own samples on the forward process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import DocInfo, Ge

from sampler.core.errors import UsageError
from sampler.registry.constraints import Count, Fraction, Positive
from sampler.training.base import TrainerBase
from sampler.training.batches import check_minibatches
from sampler.training.group_advantages import Combine, check_combination
from sampler.training.matching.levels import Law, grid_levels

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sampler.training.session import Session
    from sampler.types import Level, Prediction

Memory = Literal["on_policy", "slow", "fast"]


@dataclass(frozen=True)
class Matched:
    """Predictions for B noised samples at one level.

    new has the graph; old, base and recent are those of the weights that sampled, of the base model
    and of the average "recent", None where they are not needed. x0, eps: what the samples were
    made of. joint: the mean log-ratio over all levels [B], where the trainer needs it.
    """

    new: Prediction
    old: Prediction
    base: Prediction | None
    x0: Tensor
    eps: Tensor
    level: Level
    joint: Tensor | None = None
    recent: Prediction | None = None


@dataclass(frozen=True)
class ForwardBase(TrainerBase):
    """Base of `nft`, `awm` and `dpo`; its fields are described there."""

    group_size: Annotated[int, Ge(2), DocInfo("images of a prompt are compared")] = 8
    times: Count = 4
    law: Law = "grid"
    shift: Positive = 1.0
    low: Fraction = 0.0
    high: Fraction = 1.0
    minibatches: Count = 1
    passes: Count = 1
    train_rule: Literal["cond", "sampling"] = "cond"
    few_step: bool = False

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"{self.name}: low = {self.low:g} must be below high = {self.high:g}.")

    @property
    def judges_batches(self) -> bool:
        return True

    @property
    def images_per_prompt(self) -> int:
        return self.group_size

    def check_batch(self, images: int) -> None:
        check_minibatches(self.name, self.minibatches, images)

    def for_dry_run(self, prompts: int) -> ForwardBase:
        return replace(self, minibatches=1)

    @property
    def unused(self) -> dict[str, str]:
        return {"shift": "law = 'grid'"} if self.law == "grid" else {}

    def check(self, session: Session) -> None:
        """Raise ValueError for a few-step model, and for a range without levels."""
        pipeline = session.pipeline
        student = pipeline.student is not None or pipeline.default_sampler == "consistency"
        if student and not self.few_step:
            raise ValueError(
                f"{self.name}: matching blurs few-step models, which no longer denoise in small "
                "steps; train their teacher, or set few_step = true."
            )
        if self.law == "grid":
            grid_levels(session, self.low, self.high)


@dataclass(frozen=True)
class MatchingBase(ForwardBase):
    """Base of `nft` and `awm`: advantages within a group, under old weights that sample."""

    std: Literal["batch", "group", "none"] = "batch"
    advantages: Combine = "sum"
    max_advantage: Positive = 5.0
    memory: Memory = "on_policy"
    kl: Annotated[float, Ge(0), DocInfo("0 is off")] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combination(self.name, self.advantages, self.std)

    @property
    def averages(self) -> tuple[str, ...]:
        return ("old",)

    def decays(self, steps: int) -> dict[str, float]:
        """Return the decays of the averages after a number of optimiser steps."""
        from sampler.objectives import old_decay

        return {"old": old_decay(steps, self.memory)}

    def check(self, session: Session) -> None:
        super().check(session)
        check_combination(self.name, self.advantages, self.std, session.reward)

    def start(self) -> Any:
        return {"steps": 0}

    @property
    def recent_kl(self) -> float:
        """Weight of the distance to the average "recent", in the law of that to the base."""
        return 0.0

    def loss(self, matched: Matched, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample [B] at one level, and the same at the old weights."""
        raise NotImplementedError

    @property
    def joint(self) -> bool:
        """True where the loss takes one ratio for all levels together."""
        return False

    def log_ratio(self, matched: Matched) -> Tensor:
        """Return the log-ratio of each sample [B] at one level."""
        raise NotImplementedError

    def pull(self, new: Prediction, other: Prediction) -> Tensor:
        """Return the distance [B] to another model, of which `kl` is the weight: of the outputs."""
        from sampler.objectives import output_distance

        return output_distance(new, other)

    def kl_scale(self, sigma: float) -> float:
        """Return the factor of distances at a flow level, beside their weights."""
        return 1.0


@dataclass(frozen=True)
class PairBase(ForwardBase):
    """Base of `dpo`: pairs of images, read from `data` or judged by the reward."""

    beta: Positive = 2000.0
    anchor: Annotated[float, Ge(0), DocInfo("0 is off")] = 0.0
    data: str | None = None

    @property
    def images_per_prompt(self) -> int:
        return self.group_size if self.data is None else 2

    @property
    def unused(self) -> dict[str, str]:
        return {**super().unused, **({"group_size": "data"} if self.data is not None else {})}

    def check(self, session: Session) -> None:
        super().check(session)
        reward = session.reward
        if self.data is not None and reward is not None and reward.batched:
            raise ValueError(
                f"dpo: the pairs of data = {self.data} are judged already, so that {reward.name!r} "
                "would never be asked; leave out data or the reward."
            )

    def check_batch(self, images: int) -> None:
        pairs = images // self.images_per_prompt
        check_minibatches(self.name, self.minibatches, pairs, "pairs")

    @property
    def needs_reward(self) -> bool:
        return self.data is None

    def texts(self, given: list[str]) -> list[str]:
        """Return the prompts of the pairs. Raises UsageError for both prompts and pairs."""
        from sampler.training.matching.pair_files import read_pairs

        if self.data is None:
            return super().texts(given)
        if given:
            raise UsageError(
                f"dpo: the prompts of a run on pairs are those of data = {self.data}; leave out "
                "prompts."
            )
        return read_pairs(self.data)

    def images(self, prompts: list[str]) -> list[Path]:
        """Return the images of the pairs, each once."""
        from sampler.training.matching.pair_files import files_of

        if self.data is None:
            return []
        pairs = [files_of(self.data, prompt) for prompt in prompts]
        return sorted({path for pair in pairs for path in pair})
