"""A whole network in training: its weights, switched to the given ones and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor
from torch.nn import Parameter

from sampler.core.durable import write_file, write_folder
from sampler.models.lora import check_bare, quiet

_HALF = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class WholeNetwork:
    """The trained weights of a network by name, float32 also where it came in half precision.

    given: the weights that it came with. own: those in training, while they are switched off.
    """

    network: Any
    parameters: dict[str, Parameter]
    given: dict[str, Tensor]
    own: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def disable(self) -> None:
        self.own.update({k: p.data for k, p in self.parameters.items()})
        _put(self.parameters, {k: _wide(value) for k, value in self.given.items()})

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
    def in_given_dtype(self) -> Iterator[None]:
        """Round the weights to the data types that they came in, for the time of a context."""
        own = {k: p.data for k, p in self.parameters.items()}
        _put(self.parameters, {k: v.to(self.given[k].dtype) for k, v in own.items()})
        try:
            yield
        finally:
            _put(self.parameters, own)


@contextmanager
def unfrozen(network: Any) -> Iterator[WholeNetwork]:
    """Train all weights of a network in float32 for the time of a context.

    A network in half precision computes in float32 meanwhile, with inputs that are converted, and
    under autocast where that is on. Weights, flags and modes of the network are restored at the
    end. Raises UsageError for a network that has LoRAs, and ValueError for quantised weights.
    """
    check_bare(network)
    parameters: dict[str, Parameter] = dict(network.named_parameters())
    if other := {p.dtype for p in parameters.values()} - {*_HALF, *_WIDE}:
        raise ValueError(
            f"fit.adapter = 'full' trains weights in float32, bfloat16 or float16, and this "
            f"network has {str(other.pop())[6:]} ones; train a LoRA (fit.adapter = 'lora')."
        )
    given = {name: p.data for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    modes = {name: m.training for name, m in network.named_modules()}
    network.eval()
    half = any(value.dtype in _HALF for value in given.values())
    hook = network.register_forward_pre_hook(_wide_inputs, with_kwargs=True) if half else None
    try:
        for name, parameter in parameters.items():
            parameter.data = _wide(given[name]).clone()
            parameter.requires_grad_(True)
        yield WholeNetwork(network, parameters, given)
    finally:
        if hook is not None:
            hook.remove()
        _put(parameters, given)
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, module in network.named_modules():
            module.training = modes[name]


def _put(parameters: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].data = value
    torch.clear_autocast_cache()  # which goes by the parameter, not by its values


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _wide_inputs(
    _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the inputs of a network in half precision, such as its encoded prompts."""
    return map_tree(_wide, args), map_tree(_wide, kwargs)


def save_pipeline(trained: WholeNetwork, pipe: Any, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the pipeline around a network in training, in its own data types, in place of a folder.

    The folder is that of a stock pipeline, with manifest.json beside model_index.json.
    """
    with write_folder(folder) as temporary, trained.in_given_dtype(), quiet():
        pipe.save_pretrained(temporary, safe_serialization=True)
        text = json.dumps({"kind": "model", **manifest}, indent=2, sort_keys=True) + "\n"
        write_file(temporary / "manifest.json", text.encode())
    return folder
