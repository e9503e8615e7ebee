"""What a pipeline is loaded with besides its weights: LoRA adapters, where its parts lie, the VAE's
way of working, and compiled blocks. Each is diffusers' own; here it is asked for by name, and what
does not fit is one sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampler.errors import ModelError, SamplerError, first_line
from sampler.model_files.preflight import PICKLES

OFFLOADS = ("model", "sequential")

Loras = str | Path | Sequence[Any] | Mapping[Any, float]


def no_pickle(path: Path) -> None:
    """Raises SamplerError (6) for a file that can run code when it is opened."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path} is a pickle, which can run code, and is refused; convert it to safetensors."
        )


def put_loras(pipe: Any, loras: Loras) -> None:
    """Adds adapters at their weights: files or folders, {path: weight}, or pairs of both.

    Every layout that diffusers reads will do. Raises SamplerError (6) for a file that is missing or
    unsafe, and for an adapter of another architecture.
    """
    pairs = [_pair(given) for given in _items(loras)]
    if pairs and not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"{type(pipe).__name__} takes no LoRA adapters.")
    weights: dict[str, float] = {}
    for number, (path, weight) in enumerate(pairs):
        _put(pipe, path, name := f"lora_{number}")
        weights[name] = weight
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))


def _items(loras: Loras) -> list[Any]:
    if isinstance(loras, (str, Path)):
        return [loras]
    return list(loras.items()) if isinstance(loras, Mapping) else list(loras)


def _pair(given: Any) -> tuple[Path, float]:
    path, weight = given if isinstance(given, (tuple, list)) else (given, 1.0)
    return Path(path).expanduser(), float(weight)


def _put(pipe: Any, path: Path, name: str) -> None:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors")) or sorted((path / "lora").glob("*.safetensors"))
        path = found[0] if found else path / "pytorch_lora_weights.safetensors"
    no_pickle(path)
    if not path.is_file():
        raise ModelError(f"{path} is not there: a LoRA adapter is a safetensors file.")
    with warnings.catch_warnings():  # peft remarks that there are several adapters
        warnings.simplefilter("ignore", UserWarning)
        try:
            pipe.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
                adapter_name=name,
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:  # whatever another architecture's tensors make of the loaders
            raise _unfitting(pipe, path, error) from error
    parts = [part for part in pipe.components.values() if hasattr(part, "peft_config")]
    if not any(name in part.peft_config for part in parts):
        raise _unfitting(pipe, path, ValueError("no tensor of it has a layer there"))


def _unfitting(pipe: Any, path: Path, error: Exception) -> SamplerError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
    return ModelError(
        f"{path} does not fit {type(pipe).__name__}, it may be of another architecture: "
        f"{reason[:160].rstrip(' .')}.",
    )


def place(pipe: Any, device: Any, offload: str | None) -> None:
    """Moves a pipeline to its device; or lets its parts wait in main memory, with `offload`.

    "model" brings one part at a time to the device, "sequential" one layer at a time. Raises
    SamplerError (6) where diffusers cannot do it.
    """
    if offload is None:
        pipe.to(device)
        return
    enable = getattr(pipe, f"enable_{offload}_cpu_offload")
    try:
        enable(device=device)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"offload = {offload!r} cannot be had on {device}: {first_line(error)}"
        ) from error


def set_vae(pipe: Any, tiling: bool, slicing: bool) -> None:
    """Decodes in tiles, or one image at a time: less memory. SamplerError (6) where it cannot."""
    for wanted, name in ((tiling, "enable_tiling"), (slicing, "enable_slicing")):
        if not wanted:
            continue
        enable = getattr(getattr(pipe, "vae", None), name, None)
        if enable is None:
            raise ModelError(f"The VAE of {type(pipe).__name__} has no {name[7:]}.")
        enable()


def compile_blocks(network: Any, backend: str = "inductor") -> None:
    """Compiles a network's repeated blocks, each once, without a graph break.

    Raises SamplerError (6) for a network that names none.
    """
    if not getattr(network, "_repeated_blocks", None):
        raise ModelError(
            f"{type(network).__name__} names no repeated blocks to compile; leave compile out."
        )
    network.compile_repeated_blocks(fullgraph=True, backend=backend)
