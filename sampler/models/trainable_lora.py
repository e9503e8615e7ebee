"""A LoRA in training: put into a network, switched off and on, saved, and taken off again.

W' = W + (alpha/rank)·B·A        A: [rank, in], Gaussian; B: [out, rank], 0 at the start
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.durable import write_file
from sampler.core.errors import first_line
from sampler.models.lora import check_bare, lora_layers, strip_loras
from sampler.models.lora_files import FILE, write_lora

NAME = "finetune"


@dataclass(frozen=True)
class Adapter:
    """The trainable LoRA of a network; `parameters` by name, float32."""

    network: Any
    parameters: dict[str, torch.nn.Parameter]

    def disable(self) -> None:
        for layer in lora_layers(self.network):
            layer.enable_adapters(False)

    def enable(self) -> None:
        for layer in lora_layers(self.network):
            layer.enable_adapters(True)
        for parameter in self.parameters.values():  # switching off froze them
            parameter.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights, on the CPU."""
        return {k: p.detach().cpu().clone() for k, p in self.parameters.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Sets the weights to those that `tensors` returned."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])


@contextmanager
def adapted(
    network: Any, rank: int, alpha: int, targets: Sequence[str], seed: int
) -> Iterator[Adapter]:
    """Inside, the network has a new LoRA, and nothing else of it is trainable.

    Structure, weights and flags of the network are restored at the end. Raises ValueError where no
    layer has a target's name, and UsageError for a network that has LoRAs already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_bare(network)
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = {name: m.training for name, m in network.named_modules()}
    config = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)
    )
    network.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, network, NAME)
            except ValueError as error:
                raise ValueError(f"fit: targets {list(targets)}: {first_line(error)}") from None
        parameters = {}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(f".{NAME}." in name)
            if f".{NAME}." in name:
                parameter.data = parameter.data.float()
                parameters[name] = parameter
        yield Adapter(network, parameters)
    finally:
        strip_loras(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])
        for name, module in network.named_modules():
            module.training = modes[name]


def save_lora(adapter: Adapter, prefix: str, folder: Path, manifest: dict[str, Any]) -> Path:
    """Writes the LoRA's file and `manifest.json` into a folder; returns the file's path.

    prefix: the pipeline's name for the network, "unet" or "transformer".
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapter.network, adapter_name=NAME)
    tensors = {f"{prefix}.{k}": v.detach().cpu().float().contiguous() for k, v in state.items()}
    config = adapter.network.peft_config[NAME].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_lora(folder, tensors, {f"{prefix}.{k}": v for k, v in plain.items()})
    text = json.dumps({"kind": "lora", **manifest}, indent=2, sort_keys=True) + "\n"
    write_file(folder / "manifest.json", text.encode())
    return folder / FILE
