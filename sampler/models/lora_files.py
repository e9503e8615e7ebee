"""LoRA files: found, read, written and mixed. Imports torch only to read or write tensors.

RUN/lora/pytorch_lora_weights.safetensors   keys "unet." or "transformer." + the layer's name
ΔW = weight·(alpha/rank)·B·A                the configuration is JSON in the header
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.core.durable import write_file
from sampler.core.errors import ModelError, UsageError
from sampler.models.preflight import refuse_pickle

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"

LoraSource = str | Path | tuple[str | Path, float]
Loras = LoraSource | Sequence[LoraSource] | Mapping[str | Path, float]


def lora_pairs(loras: Loras | None, what: str = "A LoRA") -> list[tuple[Path, float]]:
    """(path, weight) of LoRAs given as paths, "PATH:weight", pairs, or {path: weight}.

    what: their name in error messages. Raises ValueError for a weight that is not a finite number.
    """
    if loras is None:
        return []
    if isinstance(loras, (str, Path)) or (isinstance(loras, tuple) and _is_pair(loras)):
        return [_pair(loras, what)]
    return [_pair(one, what) for one in (loras.items() if isinstance(loras, Mapping) else loras)]


def parse_lora(text: str, what: str = "A LoRA") -> tuple[str, float]:
    """(path, weight) of "PATH" or "PATH:weight". Raises ValueError for another weight."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, _weight(weight, what)
    except ValueError:
        raise ValueError(f"{what} is PATH or PATH:weight, not {text!r:.80}.") from None


def checked_until(until: float | None, given: bool, hosted: bool) -> float | None:
    """The share of a run's steps with LoRAs, None for all of them.

    given: there are LoRAs. Raises ValueError for a share outside 0 to 1, and UsageError where it
    has no effect.
    """
    if until is None:
        return None
    if not 0 < until <= 1:
        raise ValueError(
            f"lora_until, a share of steps, must be above 0 and at most 1, not {until}."
        )
    if not given:
        raise UsageError("lora_until needs a LoRA; give one, or leave it out.")
    if hosted:
        raise UsageError(
            "lora_until needs steps of ours, and this pipeline's own call runs; leave it out."
        )
    return float(until)


def lora_file(source: Path) -> Path:
    """The file of a LoRA given as a file, a folder or a run folder.

    Raises ModelError for a path without one, a pickle, and a folder with several.
    """
    refuse_pickle(source)
    for path in (source, source / FILE, source / "lora" / FILE):
        if path.is_file():
            return path
    found = sorted(source.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise ModelError(f"{source} has several safetensors files ({names}); name one of them.")
    if not found:
        if (source / "model" / "model_index.json").is_file():
            raise ModelError(f"{source} trained a whole network; load {source / 'model'} as model.")
        what = "has no LoRA" if source.exists() else "does not exist"
        raise ModelError(f"{source} {what}; a LoRA is a .safetensors file, or a folder with one.")
    return found[0]


def _is_pair(value: Any) -> bool:
    return len(value) == 2 and not isinstance(value[1], (str, Path, tuple))


def _pair(given: Any, what: str) -> tuple[Path, float]:
    if isinstance(given, str):
        given = parse_lora(given, what)
    path, weight = given if isinstance(given, (tuple, list)) else (given, 1.0)
    return Path(path).expanduser(), _weight(weight, what)


def _weight(value: Any, what: str) -> float:
    if not math.isfinite(weight := float(value)):
        name = what[:1].lower() + what[1:]
        raise ValueError(f"The weight of {name} must be finite, not {value!r:.40}.")
    return weight


def mix_lora(first: Path, second: Path, weight: float, out: Path) -> Path:
    """Writes the LoRA weight·ΔW₁ + (1 − weight)·ΔW₂, of the ranks' sum; returns its file.

    ΔW = B·A is mixed, not A and B: mixing the factors elementwise gives weight² and cross terms.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    (one, header), (two, other) = read_lora(lora_file(first)), read_lora(lora_file(second))
    if one.keys() != two.keys():
        raise ModelError(f"{first} and {second} are of different layers.")
    scales = [w * _scale(h) for w, h in ((weight, header), (1 - weight, other))]
    for key in one:
        pair = (one[key], two[key])
        if ".lora_A." in key:
            tensors[key] = torch.cat(pair)
        else:
            tensors[key] = torch.cat([s * t for s, t in zip(scales, pair, strict=True)], 1)
    rank = sum(int(h[_key(h, "r")]) for h in (header, other))
    merged = {**header, _key(header, "r"): rank, _key(header, "lora_alpha"): rank}
    write_lora(out, tensors, merged)
    return out / FILE


def _key(header: dict[str, Any], name: str) -> str:
    return next(key for key in header if key.rpartition(".")[2] == name)


def _scale(header: dict[str, Any]) -> float:
    return float(header[_key(header, "lora_alpha")]) / float(header[_key(header, "r")])


def write_lora(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes a LoRA file with its configuration into a folder. Raises StorageError."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header, indent=2, sort_keys=True)
    data = save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", _HEADER: text})
    write_file(folder / FILE, data)


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration in the header) of a LoRA file. ModelError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not an intact safetensors file: {error}.") from None
