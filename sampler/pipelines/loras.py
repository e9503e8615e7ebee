"""LoRAs in a network: where they are, and evaluations without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def lora_layers(network: nn.Module) -> list[Any]:
    """The layers of a network that have LoRAs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_loras(network: nn.Module) -> Iterator[None]:
    """Switch a network's LoRAs off for the time of a context; nothing is copied."""
    layers = lora_layers(network)
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # which switching changes
            parameter.requires_grad_(flag)
