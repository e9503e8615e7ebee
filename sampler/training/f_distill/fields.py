"""Fields of the trainer f_distill, and refusals of those that do not fit. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import DocInfo, Ge, Gt, Le, Predicate

from sampler.guidance.f_divergence import Divergence
from sampler.registry.constraints import Count, Nonnegative, Positive
from sampler.training.base import TrainerBase
from sampler.training.settings import Decay
from sampler.training.times import time_law

Form = Literal["full", "lora"]


def _falls(times: tuple[float, ...]) -> bool:
    return list(times) == sorted(set(times), reverse=True) and min(times, default=0) >= 0


def _is_range(times: tuple[float, float]) -> bool:
    return 0 <= times[0] < times[1] <= 1


Times = Annotated[tuple[float, ...], Predicate(_falls), DocInfo("falling times of at least 0")]
TimeRange = Annotated[
    tuple[float, float], Predicate(_is_range), DocInfo("(low, high) with 0 <= low < high <= 1")
]


@dataclass(frozen=True)
class DistillFields(TrainerBase):
    """Fields of `FDistill`, which describes them."""

    divergence: Divergence = "js"
    gan_weight: Nonnegative = 1e-3
    timesteps: Times = ()
    trajectory: Literal["renoised", "own"] = "renoised"
    separate: bool = False
    huber: Positive | None = None
    guidance_times: TimeRange | None = None
    student: Form = "full"
    fake: Form = "full"
    init: str | None = None
    data: str | None = None
    samples: Annotated[int, Ge(0)] = 256
    warmup: Annotated[int, Ge(0)] = 0
    student_every: Count = 5
    student_lr: Positive = 1.0
    ema: Decay = 0.999
    low: Annotated[float, Gt(0), Le(1)] = 0.1
    high: Annotated[float, Ge(1)] = 20.0
    bins: Count = 10
    memory: Decay = 0.0
    times: TimeRange = (0.001, 0.999)
    law: Any = "uniform"
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gan_weight == 0 and self.divergence != "rkl":
            raise ValueError(
                f"f_distill: gan_weight = {self.gan_weight} must be above 0, since the "
                "discriminator gives the ratio; only divergence = 'rkl' works with 0."
            )
        if self.init is not None and self.student == "lora":
            raise ValueError("f_distill: init needs student = 'full', a LoRA is the teacher's.")
        if self.needs_samples and self.samples < 1:
            raise ValueError("f_distill: samples must be at least 1, or give data.")
        self._check_trajectory()
        object.__setattr__(self, "law", time_law(self.law, "f_distill: law"))

    def _check_trajectory(self) -> None:
        own = self.trajectory == "own"
        given = {"separate": self.separate, "huber": self.huber}
        if not own and (name := next((k for k, v in given.items() if v), None)):
            raise ValueError(
                f"f_distill: {name} is of trajectory = 'own' and has no effect on 'renoised'; "
                "leave it out, or set trajectory."
            )
        if own and self.warmup:
            raise ValueError(
                "f_distill: the warm-up makes the first step jump to finished images, which "
                "trajectory = 'own' does not; leave warmup out, or give first weights as init."
            )

    @property
    def needs_samples(self) -> bool:
        """True where images of the teacher have to be generated."""
        return bool(self.warmup or (self.gan_weight and self.data is None))
