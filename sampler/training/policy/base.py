"""Base of the policy-gradient trainers: stochastic sampling as a Gaussian policy.

State x_i at level i, action x_{i+1} ~ N(mean_i, std_i²·I), the sampler's own move. Moves with
std = 0 are never actions. The reward r of the image is that of every action of its trajectory.

    rho = exp(log pi_theta − log pi_old)
    minimise mean max(−A·rho, −A·clip(rho, 1 − clip_range, 1 + clip_range)) + kl_beta·KL
    KL = ||mean_theta − mean_base||² / (2 std²)

Log-probabilities are float32. `reduction` "mean" divides them (and KL) by the number of elements
of a latent, as all published code does: the ratio then is the D-th root of the true one, and
clip_range belongs to it (1e-4 on the mean of 16384 elements is 1.6 nats on the sum).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge

from sampler.registry.constraints import Count, Positive
from sampler.training.base import TrainerBase
from sampler.training.batches import check_minibatches, group_of
from sampler.training.group_advantages import Combine, check_combination
from sampler.types import spans

if TYPE_CHECKING:
    from sampler.training.session import Session

Advantage = Literal["per_prompt", "group"]
Reduction = Literal["mean", "sum"]
FinalStep = Literal["drop", "pathwise", "explore"]


@dataclass(frozen=True)
class PolicyBase(TrainerBase):
    """Base of policy-gradient trainers; its fields are described in `DDPO`."""

    clip_range: Positive = 1e-4
    minibatches: Count = 1
    passes: Count = 1
    kl_beta: Annotated[float, Ge(0), DocInfo("0 is off")] = 0.0
    offload: bool = False
    select: Literal["all", "spread"] = "all"
    keep: Annotated[int, Ge(2), DocInfo("None grows from half to all")] | None = None
    prompts: Literal["order", "vade"] = "order"

    stochastic_sampler: ClassVar[str]  # a suggestion, for error messages

    @property
    def by_mean(self) -> bool:
        """True where log-probabilities are divided by the number of elements of a latent."""
        return True

    def check_choices(self) -> None:
        """Raise ValueError for a choice of images that leaves none out, or cannot be made."""
        size = self.images_per_prompt
        if self.select == "all":
            if self.keep is not None:
                raise ValueError(f"{self.name}: keep belongs to select = 'spread'; set both.")
        elif size < 2 or (self.keep or 0) > size:
            raise ValueError(
                f"{self.name}: select = 'spread' chooses among the images of a prompt: group_size "
                f"= {size} must be at least 2, and keep at most that."
            )

    @property
    def chooses(self) -> bool:
        """True where images of a group, or prompts, are chosen by their rewards."""
        return self.select != "all" or self.prompts != "order"

    @property
    def scheduled(self) -> bool:
        return self.select == "spread" and self.keep is None

    def start(self) -> Any:
        if not self.chooses:
            return self.first_state()
        return {"own": self.first_state(), "spread": None, "hits": {}, "recent": []}

    def first_state(self) -> Any:
        """Return the first state of the advantages."""
        return None

    def choose(
        self, prompts: list[str], count: int, seed: int, update: int, state: Any
    ) -> list[int] | None:
        from sampler.training.policy.selection import informative

        if self.prompts == "order":
            return None
        groups = [group_of(prompt) for prompt in prompts]
        return informative(groups, count, state["hits"], seed, update)

    def check_batch(self, images: int) -> None:
        check_minibatches(self.name, self.minibatches, images)

    def for_dry_run(self, prompts: int) -> PolicyBase:
        return replace(self, minibatches=1)

    def check(self, session: Session) -> None:
        """Raise ValueError for a sampler whose moves have no density."""
        if not session.method.stochastic:
            raise ValueError(
                f"{self.name} learns from the sampler's noise, and {session.method.name!r} with "
                f"these settings draws none; use {self.stochastic_sampler}."
            )
        if session.method.draws:
            raise ValueError(
                f"{self.name} needs the density of the sampler's moves, and {session.method.name!r}"
                f" draws further noise within a step; use {self.stochastic_sampler}."
            )
        if self.needs_actions and not noisy_steps(session):
            raise ValueError(
                f"{self.name} learns from the sampler's noise, and {session.method.name!r} draws "
                f"none in {session.steps} step{'s' if session.steps > 1 else ''}; use more steps, "
                "or a sampler with noise in one of them."
            )

    @property
    def needs_actions(self) -> bool:
        """True where the sampler's noise is all that the trainer learns from."""
        return True


@dataclass(frozen=True)
class PPOBase(PolicyBase):
    """Base of `ddpo` and `rlcm`: advantages of a ring buffer per prompt, or of a group."""

    max_advantage: Positive = 10.0
    reduction: Reduction = "mean"
    advantage: Advantage = "per_prompt"
    buffer: Count = 32
    min_count: Count = 16
    group_size: Count = 1

    def __post_init__(self) -> None:
        if self.min_count > self.buffer:
            raise ValueError(
                f"{self.name}: min_count = {self.min_count} can never be reached by a buffer of "
                f"{self.buffer}."
            )
        if self.advantage == "group" and self.group_size < 2:
            raise ValueError(f"{self.name}: advantage = 'group' needs group_size of at least 2.")
        self.check_choices()

    @property
    def by_mean(self) -> bool:
        return self.reduction == "mean"

    @property
    def unused(self) -> dict[str, str]:
        keys = ("buffer", "min_count") if self.advantage == "group" else ()
        return {**super().unused, **dict.fromkeys(keys, "advantage = 'group'")}

    @property
    def images_per_prompt(self) -> int:
        return self.group_size

    def first_state(self) -> Any:
        return {}  # ring buffers of rewards, by prompt


@dataclass(frozen=True)
class GroupBase(PolicyBase):
    """Base of `grpo`: advantages within the images of a prompt; its fields are described there."""

    ratio: Literal["plain", "guard", "dppo"] = "guard"
    reweigh: bool = False
    threshold: Positive = 1e-6
    group_size: Annotated[int, Ge(2), DocInfo("advantages are those within a group")] = 8
    std: Literal["batch", "group", "none"] = "batch"
    advantages: Combine = "sum"
    max_advantage: Positive = 5.0
    same_noise: bool = False
    kl_space: Literal["x", "v"] = "x"

    def __post_init__(self) -> None:
        if self.reweigh and self.ratio != "guard":
            raise ValueError(
                f"grpo: reweigh belongs to ratio = 'guard' and has no effect with {self.ratio!r}; "
                "set it to false."
            )
        check_combination(self.name, self.advantages, self.std)
        self.check_choices()

    @property
    def unused(self) -> dict[str, str]:
        key = "clip_range" if self.ratio == "dppo" else "threshold"
        found = {**super().unused, key: f"ratio = {self.ratio!r}"}
        return found if self.kl_beta else {**found, "kl_space": "kl_beta = 0"}

    def check(self, session: Session) -> None:
        super().check(session)
        check_combination(self.name, self.advantages, self.std, session.reward)

    @property
    def images_per_prompt(self) -> int:
        return self.group_size


def noisy_steps(session: Session) -> list[int]:
    """Return the steps of a run in which the sampler draws noise.

    Which ones they are depends on levels and settings alone, so the sampler walks over zeros.
    """
    import torch

    schedule = session.pipeline.schedule
    levels = session.method.levels(session.pipeline.grid(session.steps, session.size))
    x, state = session.method.start(torch.zeros(1, 1, 1, 1), levels[0])
    found = []
    for span in spans(levels):
        move = session.method.step(x, schedule.predict(x, x, span.now), span, state)
        state = move.state
        if not isinstance(move.std, (int, float)) or move.std > 0:
            found.append(span.index)
    return found
