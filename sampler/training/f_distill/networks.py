"""The networks of f-distill: student and fake score, copies of the teacher, and discriminator.

The teacher itself is not changed and is shared: the discriminator's heads read its features.
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

from sampler.core.adapter import PipelineAdapter
from sampler.models.student import read_network
from sampler.models.trainable_lora import TrainableLoRA, adapted
from sampler.training.averages import Average
from sampler.training.data import LatentSet
from sampler.training.f_distill.heads import FeatureReader, Heads, ProbeInput, default_features

Form = Literal["full", "lora"]


@dataclass(frozen=True)
class Distilled:
    """The trained weights, under the prefixes "student.", "fake." and "heads.".

    networks: the pipeline adapter with the models "main" (the teacher), "student" and "fake";
    ema: moving average of the student's parameters, which is saved and evaluated; real, pairs:
    latents for the discriminator and for the regression; lora: of the student, where it is one.
    """

    networks: Any
    student: nn.Module
    parameters: dict[str, nn.Parameter]
    ema: Average
    heads: Heads | None = None
    real: LatentSet | None = None
    pairs: LatentSet | None = None
    lora: TrainableLoRA | None = None

    def disable(self) -> None:
        """Do nothing: the teacher is a network of its own."""

    def enable(self) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the weights and of their average, on the CPU."""
        averages = {f"ema.{k}": v for k, v in self.ema.values.items()}
        both = {**self.parameters, **averages}
        return {k: v.detach().cpu().clone() for k, v in both.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore weights that `tensors` returned."""
        for key, parameter in self.parameters.items():
            parameter.copy_(tensors[key])
        self.ema.load({key: tensors[f"ema.{key}"] for key in self.ema.values})


@dataclass(frozen=True)
class NetworkOptions:
    """Options of the trained networks.

    student, fake: full weights or LoRA; rank, alpha, targets: of LoRAs; features: names of the
    teacher's modules that the heads read, () for the default, None for no discriminator; seed: of
    LoRAs and heads; init: folder of the student's first weights, None for the teacher's.
    """

    student: Form
    fake: Form
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    features: tuple[str, ...] | None = ()
    init: str | None = None


@contextmanager
def build_networks(
    adapter: PipelineAdapter, options: NetworkOptions, probe: ProbeInput
) -> Iterator[Distilled]:
    """Build the networks of a run; `probe` shows the shapes of the features."""
    with ExitStack() as stack:
        teacher = adapter.network
        if getattr(teacher, "peft_config", None):
            raise ValueError("f_distill: the teacher has LoRAs; fuse or remove them first.")
        first = teacher if options.init is None else read_network(teacher, Path(options.init))
        student, lora = _trainable_copy(first, options.student, options, stack)
        fake, _ = _trainable_copy(teacher, options.fake, options, stack)
        networks = adapter.with_network("student", student).with_network("fake", fake)
        modules: dict[str, nn.Module] = {"student": student, "fake": fake}
        heads = None
        if options.features is not None:
            reader = FeatureReader(networks, options.features or default_features(teacher))
            heads = modules["heads"] = Heads(reader, probe, options.seed).to(adapter.device)
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        ema = Average.of({k: p for k, p in parameters.items() if k.startswith("student.")})
        yield Distilled(networks, student, parameters, ema, heads, lora=lora)


def _trainable_copy(
    network: Any, form: Form, options: NetworkOptions, stack: ExitStack
) -> tuple[nn.Module, TrainableLoRA | None]:
    twin = copy.deepcopy(network).requires_grad_(False)
    if form == "lora":
        lora = adapted(twin, options.rank, options.alpha, options.targets, options.seed)
        return twin, stack.enter_context(lora)
    return twin.float().requires_grad_(True).eval(), None
