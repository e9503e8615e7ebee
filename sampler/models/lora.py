"""Low-rank adapters of a network: added for training, taken off again, saved, loaded.

    W' = W + weight·(alpha/rank)·B·A        A: [rank, in], Gaussian; B: [out, rank], 0 at the start

peft's layers, put into any module; files as in `lora_files`, which `load_lora_weights` of stock
pipelines reads.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.durable import write_file
from sampler.errors import ModelError, UsageError, first_line
from sampler.model_files.lora import FILE, lora_file, read_adapter, write_adapter

NAME = "finetune"


@dataclass(frozen=True)
class Adapter:
    """The trainable adapter of a network; `parameters` by name, float32."""

    network: Any
    parameters: dict[str, torch.nn.Parameter]

    def disable(self) -> None:
        for layer in _layers(self.network):
            layer.enable_adapters(False)

    def enable(self) -> None:
        for layer in _layers(self.network):
            layer.enable_adapters(True)
        for parameter in self.parameters.values():  # switching off froze them
            parameter.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights, on the CPU."""
        return {k: p.detach().cpu().clone() for k, p in self.parameters.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over weights that `tensors` gave."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])


@contextmanager
def adapted(
    network: Any, rank: int, alpha: int, targets: Sequence[str], seed: int
) -> Iterator[Adapter]:
    """Inside, the network carries a new adapter, and nothing else of it is trainable.

    Afterwards it is as it was: structure, weights and flags. Raises ValueError where no layer has
    a target's name, and for a network that carries adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _check_bare(network)
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
        _strip(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])
        for name, module in network.named_modules():
            module.training = modes[name]


def save_lora(adapter: Adapter, prefix: str, folder: Path, manifest: dict[str, Any]) -> Path:
    """Writes the adapter's file and `manifest.json` into a folder; returns the file's path.

    prefix: the pipeline's name for the network, "unet" or "transformer".
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapter.network, adapter_name=NAME)
    tensors = {f"{prefix}.{k}": v.detach().cpu().float().contiguous() for k, v in state.items()}
    config = adapter.network.peft_config[NAME].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_adapter(folder, tensors, {f"{prefix}.{k}": v for k, v in plain.items()})
    text = json.dumps({"kind": "lora", **manifest}, indent=2, sort_keys=True) + "\n"
    write_file(folder / "manifest.json", text.encode())
    return folder / FILE


def load_lora(engine: Any, *sources: str | Path | tuple[str | Path, float]) -> None:
    """Adds saved adapters to an engine's network, each at weight·ΔW (1 where none is given).

    A source is a file, a folder that has one, or the run folder of a fine-tuning; or a pair of it
    and the weight. The network of the engine's pipeline is changed; `unload_lora` undoes it.
    Raises SamplerError: 6 for a file that is missing or does not fit, 2 where adapters are on.
    """
    put_lora(engine.pipeline.network, engine.pipeline.network_name, *sources)


def put_lora(network: Any, prefix: str, *sources: str | Path | tuple[str | Path, float]) -> None:
    """The same for a network, which its pipeline calls `prefix`."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    _check_bare(network)
    frozen = {name: p.requires_grad for name, p in network.named_parameters()}
    weights: dict[str, float] = {}
    for number, given in enumerate(sources):
        source, weight = given if isinstance(given, tuple) else (given, 1.0)
        path = lora_file(Path(source))
        tensors, header = read_adapter(path)
        state = _without(tensors, prefix)
        config = {k: v for k, v in _without(header, prefix).items() if v is not None}
        if not state or not config:
            raise ModelError(
                f"{path} is no adapter of a {prefix} with its configuration in the header; use "
                "pipe.load_lora_weights for files of other tools.",
            )
        name = f"lora_{number}"
        try:
            with warnings.catch_warnings():  # peft remarks that there are several adapters
                warnings.simplefilter("ignore", UserWarning)
                inject_adapter_in_model(LoraConfig(**config), network, name)
            missing = set_peft_model_state_dict(network, state, adapter_name=name)
            if missing.unexpected_keys:
                raise ValueError(f"no layer has {missing.unexpected_keys[0]}")
        except (ValueError, RuntimeError, TypeError) as error:
            _strip(network)
            text = f"{path} does not fit this pipeline: {first_line(error)}"
            raise ModelError(text) from error
        weights[name] = weight
    for layer in _layers(network):
        layer.set_adapter([name for name in weights if name in layer.scaling])
        for name, weight in weights.items():
            layer.set_scale(name, weight)
    for name, parameter in network.named_parameters():
        plain = name.replace(".base_layer.", ".")
        parameter.requires_grad_(frozen.get(plain, False))


def unload_lora(engine: Any) -> None:
    """Takes every adapter off an engine's network."""
    _strip(engine.pipeline.network)


def merge_lora(network: Any) -> None:
    """Adds ΔW of every adapter to the network's own weights, and takes the adapters off."""
    for layer in _layers(network):
        layer.merge()
    _strip(network)


def _layers(network: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _strip(network: Any) -> None:
    """Puts the layers below the adapters back in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config


def _check_bare(network: Any) -> None:
    if _layers(network):
        raise UsageError(
            "The network carries adapters already; take them off first (unload_lora, or "
            "pipe.unload_lora_weights), or fuse them.",
        )


def _without(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below "prefix.", without it."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tree.items() if k.startswith(start)}
