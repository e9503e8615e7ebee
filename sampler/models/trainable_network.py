"""A whole network in training: its weights, switched to the given ones and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sampler.core.durable import write_file, write_folder
from sampler.models.lora import check_bare


@dataclass(frozen=True)
class WholeNetwork:
    """The trained weights of a float32 network; `parameters` by name.

    given: the weights that it came with. own: those in training, while they are switched off.
    """

    network: Any
    parameters: dict[str, Parameter]
    given: dict[str, Tensor]
    own: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def disable(self) -> None:
        self.own.update({k: p.data for k, p in self.parameters.items()})
        _put(self.parameters, self.given)

    def enable(self) -> None:
        _put(self.parameters, self.own)
        self.own.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights, on the CPU."""
        return {k: p.detach().cpu().clone() for k, p in self.parameters.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Sets the weights to those that `tensors` returned."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])


@contextmanager
def unfrozen(network: Any) -> Iterator[WholeNetwork]:
    """Train all weights of a float32 network for the time of a context.

    Weights, flags and modes of the network are restored at the end. Raises UsageError for a network
    that has LoRAs, and ValueError for one of another dtype.
    """
    check_bare(network)
    parameters: dict[str, Parameter] = dict(network.named_parameters())
    if other := {p.dtype for p in parameters.values()} - {torch.float32}:
        raise ValueError(
            f"All weights are trained in float32, and this network is {str(other.pop())[6:]}; load "
            "it with dtype = float32 (mixed_precision = 'bf16' saves memory), or train a LoRA."
        )
    given = {name: p.data for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    modes = {name: m.training for name, m in network.named_modules()}
    network.eval()
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        yield WholeNetwork(network, parameters, given)
    finally:
        _put(parameters, given)
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, module in network.named_modules():
            module.training = modes[name]


def _put(parameters: dict[str, Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].data = value


def save_pipeline(pipe: Any, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the pipeline, whose network is in training, in place of a folder.

    The folder is that of a stock pipeline, with manifest.json beside model_index.json.
    """
    with write_folder(folder) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
        text = json.dumps({"kind": "model", **manifest}, indent=2, sort_keys=True) + "\n"
        write_file(temporary / "manifest.json", text.encode())
    return folder
