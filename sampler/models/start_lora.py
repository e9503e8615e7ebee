"""Initialisation of a LoRA in training from other LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sampler.core.errors import ModelError, UsageError
from sampler.models.lora import apply_loras, lora_layers, strip_loras

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Factors(NamedTuple):
    """ΔW = B·A of one layer: A [rank, in, ...], B [out, rank, ...]."""

    a: Tensor
    b: Tensor


def read_factors(
    pipe: DiffusionPipeline, network: nn.Module, loras: Sequence[tuple[Path, float]]
) -> dict[str, Factors]:
    """Return ΔW of LoRAs together, by layer of a pipeline's network.

    The files may be of any tool whose LoRAs can be loaded. Raises ModelError where they also change
    another component, and the errors of `apply_loras`.
    """
    apply_loras(pipe, loras)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    try:
        for name, part in parts.items():
            if part is not network and lora_layers(part):
                raise ModelError(
                    f"{loras[0][0]} changes the {name} as well; fine-tuning starts from LoRAs of "
                    "the denoising network alone."
                )
        return {
            name: _factors(layer)
            for name, layer in network.named_modules()
            if layer in set(lora_layers(network))
        }
    finally:
        for part in parts.values():
            strip_loras(part)


def _factors(layer: Any) -> Factors:
    pairs = [(layer.lora_A[key], layer.lora_B[key], layer.scaling[key]) for key in layer.lora_A]
    a = torch.cat([down.weight.detach().float() for down, _, _ in pairs])
    b = torch.cat([scale * up.weight.detach().float() for _, up, scale in pairs], 1)
    return Factors(a, b)


@torch.no_grad()
def initialise_lora(network: nn.Module, name: str, factors: Mapping[str, Factors]) -> None:
    """Set the LoRA `name` of a network to the same ΔW; ranks above that of ΔW start at 0.

    Raises UsageError for a layer without that LoRA, and for a smaller rank.
    """
    layers: dict[str, Any] = {
        key: layer for key, layer in network.named_modules() if layer in set(lora_layers(network))
    }
    for key, (a, b) in factors.items():
        if key not in layers:
            raise UsageError(
                f"fit.init_lora changes the layer {key}, which fit.targets leaves out; add "
                f"{key.rpartition('.')[2]!r} to fit.targets."
            )
        down, up = layers[key].lora_A[name].weight, layers[key].lora_B[name].weight
        rank = len(a)
        if rank > len(down):
            raise UsageError(
                f"fit.rank = {len(down)} is less than {rank}, the rank of fit.init_lora; set "
                f"fit.rank to at least {rank}."
            )
        down[:rank] = a.to(down)
        up[:, :rank] = (b / layers[key].scaling[name]).to(up)
