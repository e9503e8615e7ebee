"""Checks of LoRA files: complete, and loaded without a tensor left out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from sampler.core.errors import ModelError

# Parts of tensor names by which other algorithms than LoRA are known.
_ALGORITHMS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "oft_": "an OFT",
    "lora_mid": "a LoCon with a middle factor",
    "on_input": "an IA3",
    "base_model.model.": "an adapter of the library peft, without the pipeline's prefixes",
}
_UP = ".lora_up.weight"  # of kohya's files, which have an alpha for every layer
_PAIRS = {
    ".lora_A.": ".lora_B.",
    ".lora_down.": ".lora_up.",
    "_lora.down.": "_lora.up.",
    ".lora.down.": ".lora.up.",
    ".lora_linear_layer.down.": ".lora_linear_layer.up.",
}


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses non-finite weights, a factor without its twin, and an alpha without its layer."""
    layers = {key[:k] for key in tensors if not key.endswith(".alpha")
              for k, letter in enumerate(key) if letter == "."}  # fmt: skip
    for key, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise ModelError(f"{path} has nan or infinity in {key}; it is damaged.")
        if key.endswith(".alpha") and tensor.numel() != 1:
            raise ModelError(f"{path} has {tuple(tensor.shape)} in {key}, which is one number.")
        if key.endswith(".alpha") and key.removesuffix(".alpha") not in layers:
            raise ModelError(f"{path} has {key} without the layer's weights; it is incomplete.")
        for one, other in _PAIRS.items():
            for first, second in ((one, other), (other, one)):
                twin = key.replace(first, second)
                if first in key and key.endswith(".weight") and twin not in tensors:
                    raise ModelError(f"{path} has {key} without {twin}; it is incomplete.")


def fold_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with alpha/rank folded into B where the alphas differ between layers.

    The stock loaders of UNets and text encoders apply one alpha to all attention layers then, also
    to a layer without one, whose alpha is its rank.
    """
    alphas = {k: float(v) for k, v in tensors.items() if k.endswith(".alpha")}
    complete = len(alphas) in (0, sum(key.endswith(_UP) for key in tensors))
    if len(set(alphas.values())) < 2 and complete:
        return tensors
    folded = {k: v for k, v in tensors.items() if k not in alphas}
    for key, alpha in alphas.items():
        up = key.removesuffix(".alpha") + _UP
        if up not in folded:
            return tensors
        folded[up] = tensors[up].float() * (alpha / tensors[up].shape[1])
    return folded


def unused_tensors(tensors: dict[str, Tensor], parts: dict[str, nn.Module], name: str) -> list[str]:
    """Names of the file's tensors that are in no layer of the LoRA `name`.

    Loaders of transformers split and scale tensors; there the numbers of elements are compared.
    """
    loaded: list[Tensor] = []
    for key, parameter in (p for part in parts.values() for p in part.named_parameters()):
        if f".{name}" in key and parameter.device.type == "meta":
            raise ModelError(f"The file is incomplete: it has no values for {key}.")
        if f".{name}" in key:
            loaded.append(parameter.detach().cpu())
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in loaded:
        shapes.setdefault(parameter.shape, []).append(parameter)
    wanted = {key: tensor for key, tensor in fold_alphas(tensors).items() if tensor.ndim}
    unused = [
        key
        for key, tensor in wanted.items()
        if not any(torch.equal(p, tensor.to(p.dtype)) for p in shapes.get(tensor.shape, ()))
    ]
    enough = sum(map(Tensor.numel, loaded)) >= sum(map(Tensor.numel, wanted.values()))
    return [] if "unet" not in parts and enough else unused


def misfit(path: Path, names: Iterable[str], target: str, why: str) -> ModelError:
    text = "\n".join(names)
    for part, algorithm in _ALGORITHMS.items():
        if part in text:
            return ModelError(
                f"{path} is {algorithm}, which {target} cannot apply; convert it to a plain LoRA, "
                "or merge it into the model."
            )
    return ModelError(f"{path} does not fit {target}, it may be of another architecture: {why}.")


def reason_of(error: Exception, names: Iterable[str]) -> str:
    """The line of a loader's error that names the problem, or the first tensor of no LoRA."""
    if foreign := [name for name in names if "lora" not in name]:
        return f"its tensor {foreign[0]} is not of a LoRA"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)][:160].rstrip(" .") if lines else type(error).__name__
