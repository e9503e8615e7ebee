"""Adapter files in the layout of diffusers: read, written, found, mixed.

RUN/lora/pytorch_lora_weights.safetensors   keys "unet." or "transformer." + the layer's name
ΔW = weight·(alpha/rank)·B·A                the configuration is JSON in the header
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.core.durable import write_file
from sampler.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"


def parse_lora(text: str) -> tuple[str, float]:
    """ "DIR" or "DIR:weight" of the command line. ValueError for a weight that is no number."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise ValueError(f"--lora takes DIR or DIR:weight, not {text!r:.80}.") from None


def lora_file(source: Path) -> Path:
    """The adapter's file of a file, a folder, or a run folder. SamplerError (6) without one."""
    for path in (source, source / FILE, source / "lora" / FILE):
        if path.is_file():
            return path
    raise ModelError(f"{source} has no adapter: {FILE} is neither there nor in lora/.")


def mix_lora(first: Path, second: Path, weight: float, out: Path) -> Path:
    """Writes the adapter weight·ΔW₁ + (1 − weight)·ΔW₂, of the ranks' sum; returns its file.

    ΔW = B·A is mixed, not A and B: mixing the factors elementwise gives weight² and cross terms.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    (one, header), (two, other) = read_adapter(lora_file(first)), read_adapter(lora_file(second))
    if one.keys() != two.keys():
        raise ModelError(f"{first} and {second} adapt different layers.")
    scales = [w * _scale(h) for w, h in ((weight, header), (1 - weight, other))]
    for key in one:
        pair = (one[key], two[key])
        if ".lora_A." in key:
            tensors[key] = torch.cat(pair)
        else:
            tensors[key] = torch.cat([s * t for s, t in zip(scales, pair, strict=True)], 1)
    rank = sum(int(h[_key(h, "r")]) for h in (header, other))
    merged = {**header, _key(header, "r"): rank, _key(header, "lora_alpha"): rank}
    write_adapter(out, tensors, merged)
    return out / FILE


def _key(header: dict[str, Any], name: str) -> str:
    return next(key for key in header if key.rpartition(".")[2] == name)


def _scale(header: dict[str, Any]) -> float:
    return float(header[_key(header, "lora_alpha")]) / float(header[_key(header, "r")])


def write_adapter(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header, indent=2, sort_keys=True)
    data = save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", _HEADER: text})
    write_file(folder / FILE, data)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) of an adapter's file. SamplerError (6) for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no adapter that can be read: {error}.") from None
