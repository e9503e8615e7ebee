"""Learned proximal networks as folders: config.json and model.safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sampler.core.durable import make_folder, write_file
from sampler.core.errors import UsageError
from sampler.models.proximal import ProximalConfig, ProximalNetwork


def save_proximal(network: ProximalNetwork, folder: Path, training: Any = None) -> Path:
    """Write config.json and model.safetensors into a folder; return it.

    training: plain data about the training, which is stored in the header of the weights.
    """
    make_folder(folder)
    header = {"format": "pt", "training": json.dumps(training)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    write_file(folder / "model.safetensors", save(tensors, header))
    text = json.dumps(asdict(network.config), indent=2, sort_keys=True) + "\n"
    write_file(folder / "config.json", text.encode())
    return folder


def load_proximal(folder: str | Path) -> ProximalNetwork:
    """Load a network that `save_proximal` wrote. Raises UsageError where it cannot be read."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = ProximalNetwork(ProximalConfig(**config))
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{folder} holds no proximal network: {reason}.") from None
    return network.eval()
