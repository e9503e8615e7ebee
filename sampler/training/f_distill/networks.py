"""The networks of f-distill: a student and a fake score made of the teacher, a discriminator.

The teacher itself stays as it is and is shared: the discriminator's heads read its features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sampler.models.lora import adapted
from sampler.models.student import read_network
from sampler.training.f_distill.data import Samples
from sampler.training.f_distill.heads import Heads, Reader, default_features

Form = Literal["full", "lora"]


@dataclass(frozen=True)
class Distilled:
    """What a run trains, by group: "student.", "fake." and "heads." + the parameter's name.

    world: the pipeline's adapter with the models "main" (the teacher), "student" and "fake";
    average: of the student's parameters, what is saved and evaluated; real, pairs: samples for the
    discriminator and for the regression.
    """

    world: Any
    student: nn.Module
    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    heads: Heads | None = None
    real: Samples | None = None
    pairs: Samples | None = None
    lora: Any = None

    def disable(self) -> None:
        """Nothing to do: the teacher is a network of its own."""

    def enable(self) -> None:
        """Nothing to do."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights and of the average, on the CPU."""
        averages = {f"ema.{k}": v for k, v in self.average.items()}
        both = {**self.parameters, **averages}
        return {k: v.detach().cpu().clone() for k, v in both.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over weights that `tensors` gave."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])
            for key, value in self.average.items():
                value.copy_(tensors[f"ema.{key}"])

    @torch.no_grad()
    def follow(self, decay: float, updates: int) -> None:
        """The average after the student's update number `updates`, from 0.

        average ← d·average + (1 − d)·weights,   d = min(decay, (1 + n)/(10 + n))
        """
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        for key, value in self.average.items():
            value.lerp_(self.parameters[key].detach(), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student has its average weights."""
        own = {k: self.parameters[k].detach().clone() for k in self.average}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            self.parameters[key].copy_(value)


@dataclass(frozen=True)
class Build:
    """How the networks are made. student, fake: the form of what is trained; rank, alpha, targets:
    of adapters; features: names of the teacher's modules that the heads read, () for the default;
    seed: of adapters and heads; init: folder of the student's first weights, None for the
    teacher's."""

    student: Form
    fake: Form
    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int
    features: tuple[str, ...] | None = ()
    init: str | None = None


@contextmanager
def distilled(adapter: Any, build: Build, probe: Any) -> Iterator[Distilled]:
    """The networks of a run; all that is made is let go of afterwards.

    probe: (x [1, ...], level, cond) of one row, for the shapes of the features. Without features
    (None) there is no discriminator.
    """
    with ExitStack() as stack:
        teacher = adapter.network
        if hasattr(teacher, "peft_config"):
            raise ValueError("f_distill: the teacher carries adapters; fuse or remove them first.")
        first = teacher if build.init is None else read_network(teacher, Path(build.init))
        student, lora = _made(first, build.student, build, stack)
        fake, _ = _made(teacher, build.fake, build, stack)
        world = adapter.with_network("student", student).with_network("fake", fake)
        groups: dict[str, nn.Module] = {"student": student, "fake": fake}
        heads = None
        if build.features is not None:
            reader = Reader(world, build.features or default_features(teacher))
            heads = groups["heads"] = Heads(reader, probe, build.seed).to(adapter.device)
        parameters = {
            f"{group}.{name}": parameter
            for group, module in groups.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        average = {k: p.detach().clone() for k, p in parameters.items() if k.startswith("student.")}
        yield Distilled(world, student, parameters, average, heads, lora=lora)


def _made(network: Any, form: Form, build: Build, stack: ExitStack) -> tuple[nn.Module, Any]:
    """A copy of a network, trainable as a whole or through an adapter."""
    twin = copy.deepcopy(network).requires_grad_(False)
    if form == "lora":
        options = (build.rank, build.alpha, build.targets, build.seed)
        return twin, stack.enter_context(adapted(twin, *options))
    return twin.float().requires_grad_(True).eval(), None
