"""LoRAs in training: added to a network, switched off and on, saved, and removed.

W' = W + (alpha/rank)·B·A        A: [rank, in], Gaussian; B: [out, rank], 0 at the start
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sampler import registry
from sampler.core.durable import write_file
from sampler.models.lora import check_bare, lora_layers, strip_loras
from sampler.models.lora_files import FILE, write_lora
from sampler.models.start_lora import Factors, initialise_lora

NAME = "finetune"
# Attention projections, with the fused ones of Flux 2's single-stream blocks.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out")
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class TrainableLoRA:
    """A trainable LoRA of a network; `parameters` by name, float32. name: peft's for it."""

    network: Any
    parameters: dict[str, torch.nn.Parameter]
    name: str = NAME

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
    network: Any,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    start: Mapping[str, Factors] | None = None,
) -> Iterator[TrainableLoRA]:
    """Give the network a new LoRA for the time of a context; nothing else of it is trainable.

    start: ΔW of layers to begin with, 0 by default. Structure, weights and flags of the network
    are restored at the end. Raises ValueError where no layer has a target's name, and UsageError
    for a network that has LoRAs already, and for a start that does not fit.
    """
    with _restored(network):
        parameters = _inject(network, NAME, rank, alpha, _layer_names(network, targets), seed)
        if start is not None:
            initialise_lora(network, NAME, start)
        yield TrainableLoRA(network, parameters)


@contextmanager
def shared(
    network: Any, names: Sequence[str], rank: int, alpha: float, targets: Sequence[str], seed: int
) -> Iterator[dict[str, TrainableLoRA]]:
    """Give a network several new LoRAs for the time of a context, none of them in use.

    By name, each as a LoRA of a `WithLoRA`: the network with that LoRA in use. Errors as `adapted`,
    and ValueError for a network with gradient checkpointing, whose backward pass would compute
    again without the LoRA.
    """
    if names and getattr(network, "is_gradient_checkpointing", False):
        raise ValueError(
            "Several LoRAs of one network do not work with gradient checkpointing; switch it off "
            "(disable_gradient_checkpointing)."
        )
    with _restored(network):
        layers = _layer_names(network, targets) if names else []
        found = {name: _inject(network, name, rank, alpha, layers, seed) for name in names}
        for layer in lora_layers(network):
            layer.enable_adapters(False)
        for parameters in found.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        yield {
            name: TrainableLoRA(WithLoRA(network, name), parameters, name)
            for name, parameters in found.items()
        }


class WithLoRA:
    """A network that several LoRAs share, with one of them in use during its calls.

    Everything else is the network's own. Outside of a call no LoRA is in use.
    """

    def __init__(self, network: Any, name: str) -> None:
        self._network, self._name = network, name
        self._layers = lora_layers(network)
        self._trained = [p for layer in self._layers for p in layer.parameters() if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self._layers:
            layer.set_adapter(self._name)
            layer.enable_adapters(True)
        try:
            return self._network(*args, **kwargs)
        finally:
            for layer in self._layers:
                layer.enable_adapters(False)
            for parameter in self._trained:  # switching froze them
                parameter.requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


@contextmanager
def _restored(network: Any) -> Iterator[None]:
    """Restore structure, flags and modes of a network without LoRAs at the end of a context."""
    check_bare(network)
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = {name: m.training for name, m in network.named_modules()}
    network.eval()
    try:
        yield
    finally:
        strip_loras(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])
        for name, module in network.named_modules():
            module.training = modes[name]


def _inject(
    network: Any, name: str, rank: int, alpha: float, layers: list[str], seed: int
) -> dict[str, nn.Parameter]:
    """Add a LoRA, the only weights of the network that are trainable then; its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]: any number works
        init_lora_weights="gaussian",
        target_modules=layers,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, name)
    parameters = {}
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(f".{name}." in key)
        if f".{name}." in key:
            parameter.data = parameter.data.float()
            parameters[key] = parameter
    return parameters


def default_targets(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's attention projections. UsageError where it has LoRAs."""
    check_bare(network)
    return tuple(target for target in TARGETS if _named(network, target)[1])


def _named(network: nn.Module, target: str) -> tuple[list[str], list[str]]:
    """Return the modules of a target's name, and those of them that can have a LoRA."""
    modules = {
        name: module
        for name, module in network.named_modules()
        if name == target or name.endswith(f".{target}")
    }
    return list(modules), [name for name, m in modules.items() if isinstance(m, _LAYERS)]


def _layer_names(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return targets as peft takes them: in full where other modules have the same name."""
    names: list[str] = []
    for target in targets:
        modules, layers = _named(network, target)
        if not layers:
            known = {name.rpartition(".")[2] for name, _ in network.named_modules()}
            raise ValueError(
                f"fit.targets: the network has no layer {target!r}"
                f"{registry.suggestion(target, known)}."
            )
        names += [target] if layers == modules else layers
    return names


def save_lora(adapter: TrainableLoRA, prefix: str, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the LoRA's file and `manifest.json` into a folder; return the file's path.

    The strength alpha/rank is in the tensors B, and lora_alpha = rank in the header, for tools that
    read no header. prefix: the pipeline's name for the network, "unet" or "transformer".
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapter.network, adapter_name=adapter.name)
    config = adapter.network.peft_config[adapter.name].to_dict()
    strength = config["lora_alpha"] / config["r"]
    tensors = {
        f"{prefix}.{k}": (v * strength if ".lora_B." in k else v).detach().cpu().float()
        for k, v in state.items()
    }
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain["lora_alpha"] = config["r"]
    write_lora(folder, tensors, {f"{prefix}.{k}": v for k, v in plain.items()})
    text = json.dumps({"kind": "lora", **manifest}, indent=2, sort_keys=True) + "\n"
    write_file(folder / "manifest.json", text.encode())
    return folder / FILE
