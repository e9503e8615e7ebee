"""Identity of a model in memory: a hash of everything that determines its images.

Tensors and configurations of every component, vocabularies of tokenizers, weights of LoRAs, further
networks (weak, student), and how they are computed: attention, VAE tiling, compiled blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sampler.core.loop import Loop
from sampler.runs.jobs import Model


def model_in_memory(engine: Loop) -> Model:
    """Identity of the model of an engine; two engines with equal images have the same."""
    adapter = engine.pipeline
    pipe, digest = adapter.pipe, hashlib.sha256()
    parts = dict(getattr(pipe, "components", {}))
    seen = {id(part) for part in parts.values()}
    for name, network in getattr(adapter, "networks", {}).items():
        if id(network) not in seen:
            parts[f"network {name}"] = network
    for name, part in sorted(parts.items()):
        if part is None:
            continue
        digest.update(f"\n{name} {_text(_facts(part))}".encode())
        if isinstance(part, torch.nn.Module):
            for key, tensor in _tensors(part):
                digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
    settings = {
        "pipe": _plain(getattr(pipe, "config", {})),
        "student": getattr(adapter, "student", None),
    }
    if getattr(adapter, "prompt_weights", None) is not None:
        settings["prompt_weights"] = True
    if (until := getattr(adapter, "lora_until", None)) is not None:
        settings["lora_until"] = until
    digest.update(_text(settings).encode())
    path = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    label = str(path).rstrip("/").rpartition("/")[2] if path else type(pipe).__name__
    dtype = str(adapter.dtype).removeprefix("torch.")
    return Model(f"tensors:{digest.hexdigest()}", dtype, label)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """State of a module by name, also of one whose weights accelerate keeps in its hooks."""
    kept: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        weights: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        if weights is None:
            continue
        for name, tensor in part.named_parameters(recurse=False):
            if tensor.device.type == "meta":
                kept[f"{prefix}.{name}".lstrip(".")] = weights[name]
    yield from sorted({**module.state_dict(), **kept}.items())


def _facts(part: Any) -> dict[str, Any]:
    """All facts of a component except its tensors, as plain data."""
    facts: dict[str, Any] = {"config": _plain(getattr(part, "config", None))}
    if isinstance(part, torch.nn.Module):
        modules: dict[str, Any] = dict(part.named_modules())
        facts["how"] = [fact for name in modules for fact in _how(name, modules[name])]
    elif callable(getattr(part, "get_vocab", None)):
        facts["words"] = _words(part)
    elif callable(to_dict := getattr(part, "to_dict", None)):
        facts["config"] = _plain(to_dict())
    return facts


def _how(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    """Facts of how a module computes: LoRA weights, attention, tiles, compilation."""
    active, scaling = (getattr(module, key, None) for key in ("active_adapters", "scaling"))
    if active is not None and isinstance(scaling, Mapping):
        yield f"{name} lora", [(key, scaling.get(key)) for key in active]
    if (processor := getattr(module, "processor", None)) is not None:
        backend = getattr(processor, "_attention_backend", None)
        yield f"{name} attention", (type(processor).__name__, str(backend))
    if getattr(module, "use_tiling", False):
        tiles = {k: v for k, v in vars(module).items() if k.startswith("tile_")}
        yield f"{name} tiles", _plain(tiles)
    if getattr(module, "_compiled_call_impl", None) is not None:
        yield f"{name} compiled", True


def _words(tokenizer: Any) -> dict[str, Any]:
    """Facts of a tokenizer that decide its tokens, without the padding that calls leave in it."""
    names = ("model_max_length", "padding_side", "chat_template", "special_tokens_map")
    facts = {name: getattr(tokenizer, name, None) for name in names}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {**facts, "vocabulary": tokenizer.get_vocab()}
    tree = json.loads(backend.to_str())
    return {**facts, "tokenizer": {**tree, "padding": None, "truncation": None}}


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without the names of paths and versions, which change no image."""
    to_dict = getattr(config, "to_dict", None)
    config = to_dict() if callable(to_dict) else config
    if not isinstance(config, Mapping):
        return {}
    dropped = ("transformers_version", "torch_dtype", "dtype", "use_slicing")
    return {str(k): v for k, v in config.items() if not str(k).startswith("_") and k not in dropped}


def _text(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)
