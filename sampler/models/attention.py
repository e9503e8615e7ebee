"""Attention backends of a network: torch's own, or xformers'.

Images differ in the last bits between the two. xformers is an optional extra for CUDA; it is used
on request only, and is tried on a small tensor before a network is given to it, since a network
would accept it silently and fail at its first step.
"""

from __future__ import annotations

from typing import Any

import torch

from sampler.config.model import ATTENTIONS
from sampler.core.errors import ModelError, first_line


def set_attention(network: Any, name: str) -> None:
    """Sets a diffusers network's attention: "auto" leaves it as it was loaded.

    "native" is torch's scaled_dot_product_attention. Raises ValueError for another name, and
    SamplerError (6) that names the cause where the network or the machine cannot do it.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention = {name!r:.40} must be one of {', '.join(ATTENTIONS)}.")
    if name == "auto":
        return
    if name == "xformers":
        _try_xformers(network.device)
    try:
        if _has_backends(network):
            network.set_attention_backend(name)
        elif name == "xformers":
            network.enable_xformers_memory_efficient_attention()
        else:
            from diffusers.models.attention_processor import AttnProcessor2_0

            network.set_attn_processor(AttnProcessor2_0())
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"attention = {name!r} cannot be set on {type(network).__name__}: {error}"
        ) from error


def _has_backends(network: Any) -> bool:
    """Return whether its processors take a backend; a UNet's do not, and would ignore it."""
    processors = (getattr(module, "processor", None) for module in network.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _try_xformers(device: torch.device) -> None:
    """One real call, since an installation that imports may still have no kernel to run."""
    if device.type != "cuda":
        raise ModelError(
            f"attention = 'xformers' needs a CUDA device, and the model is on {device}; "
            "use 'native'.",
        )
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        q = torch.randn(1, 16, 2, 32, device=device, dtype=torch.float16)
        memory_efficient_attention(q, q, q)
    except Exception as error:  # whatever a missing package or a wrong build raises
        raise ModelError(
            f"attention = 'xformers' does not work here ({first_line(error)}); install the extra "
            "'xformers' in a version that fits this torch, or use 'native'.",
        ) from error
