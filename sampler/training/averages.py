"""Moving averages of trained weights, kept in the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from sampler.core.errors import RunFolderError

if TYPE_CHECKING:
    from sampler.models.trainable_lora import TrainableLoRA
    from sampler.models.trainable_network import WholeNetwork
    from sampler.training.data import LatentSet

T = TypeVar("T")


@dataclass(frozen=True)
class Average:
    """A moving average of parameters by name, float32; it starts at their values."""

    parameters: Mapping[str, Parameter]
    values: dict[str, Tensor]

    @staticmethod
    def of(parameters: Mapping[str, Parameter]) -> Average:
        return Average(parameters, {k: p.detach().clone() for k, p in parameters.items()})

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average ← decay·average + (1 − decay)·weights."""
        for key, value in self.values.items():
            value.lerp_(self.parameters[key].detach(), 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in self.values.items():
            value.copy_(tensors[key])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the averaged values for the time of a context."""
        own = {k: self.parameters[k].detach().clone() for k in self.values}
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            self.parameters[key].copy_(value)
        torch.clear_autocast_cache()  # which goes by the parameter, not by its values


def warm_decay(decay: float, updates: int) -> float:
    """Return min(decay, (1 + n)/(10 + n)) after n earlier updates: the average starts quickly."""
    return min(decay, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class Averaged:
    """Weights in training with averages of them by name, such as "old" and "ema".

    adapter: a LoRA, or the whole network; data: what they are trained on, where it is a data set.
    """

    adapter: TrainableLoRA | WholeNetwork
    averages: dict[str, Average]
    data: LatentSet | None = None

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return self.adapter.parameters

    def disable(self) -> None:
        self.adapter.disable()

    def enable(self) -> None:
        self.adapter.enable()

    @contextmanager
    def evaluated(self, value: T) -> Iterator[T]:
        """Install the average "ema", if there is one, for the time of a context."""
        average = self.averages.get("ema")
        with nullcontext() if average is None else average.in_place():
            yield value

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the weights and their averages, as "old.NAME", on the CPU."""
        found = self.adapter.tensors()
        for name, average in self.averages.items():
            found |= {f"{name}.{k}": v.cpu().clone() for k, v in average.values.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned. Raises RunFolderError (4) for a missing average."""
        self.adapter.load(tensors)
        for name, average in self.averages.items():
            own = {k: tensors[f"{name}.{k}"] for k in average.values if f"{name}.{k}" in tensors}
            if len(own) < len(average.values):
                raise RunFolderError(
                    f"The checkpoint lacks the average {name!r}, which an earlier version did not "
                    "keep; begin the run anew in another folder."
                )
            average.load(own)
