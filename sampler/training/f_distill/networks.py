"""The networks of f-distill: student, fake score and discriminator.

Student and fake score are copies of the teacher, or LoRAs on the teacher itself, in use only while
they are evaluated. The discriminator's heads read the teacher's features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampler.core.adapter import PipelineAdapter
from sampler.core.binding import model_name
from sampler.models.student import read_network
from sampler.models.trainable_lora import TrainableLoRA, shared
from sampler.training.averages import Average
from sampler.training.data import LatentSet
from sampler.training.f_distill.fields import Form
from sampler.training.f_distill.heads import FeatureReader, Heads, ProbeInput, default_features


@dataclass(frozen=True)
class Distilled:
    """The trained weights, under the prefixes "student.", "fake." and "heads.".

    networks: the pipeline adapter with the models "main" (the teacher), "student" and "fake";
    ema: moving average of the student's parameters, which is saved and evaluated; real, pairs:
    latents for the discriminator and for the regression; lora: of the student, where it is one;
    base: name of the teacher's weights, without LoRAs.
    """

    networks: Any
    student: nn.Module
    parameters: dict[str, nn.Parameter]
    ema: Average
    heads: Heads | None = None
    real: LatentSet | None = None
    pairs: LatentSet | None = None
    lora: TrainableLoRA | None = None
    base: str = ""

    def disable(self) -> None:
        """Do nothing: the engine's network is the teacher, whose LoRAs are out of use."""

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
    teacher = adapter.network
    if getattr(teacher, "peft_config", None):
        raise ValueError("f_distill: the teacher has LoRAs; fuse or remove them first.")
    base = model_name(adapter)
    first = teacher if options.init is None else read_network(teacher, Path(options.init))
    forms = {"student": (options.student, first), "fake": (options.fake, teacher)}
    modules: dict[str, Any] = {
        name: copy.deepcopy(network).float().requires_grad_(True).eval()
        for name, (form, network) in forms.items()
        if form == "full"
    }
    adapted = [name for name in forms if name not in modules]
    chosen = options.rank, options.alpha, options.targets, options.seed
    with shared(teacher, adapted, *chosen) as loras:
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in {**modules, **loras}.items()
            for name, parameter in _parameters_of(module).items()
        }
        modules |= {name: lora.network for name, lora in loras.items()}
        networks = adapter
        for name in forms:
            networks = networks.with_network(name, modules[name])
        heads = None
        if options.features is not None:
            reader = FeatureReader(networks, options.features or default_features(teacher))
            heads = Heads(reader, probe, options.seed).to(adapter.device)
            parameters |= {f"heads.{name}": p for name, p in heads.named_parameters()}
        ema = Average.of({k: p for k, p in parameters.items() if k.startswith("student.")})
        student, lora = modules["student"], loras.get("student")
        yield Distilled(networks, student, parameters, ema, heads, lora=lora, base=base)


def _parameters_of(trained: nn.Module | TrainableLoRA) -> dict[str, nn.Parameter]:
    if isinstance(trained, TrainableLoRA):
        return trained.parameters
    return dict(trained.named_parameters())
