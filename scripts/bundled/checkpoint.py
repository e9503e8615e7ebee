"""Checkpoints of the trainer: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def save_checkpoint(
    folder: Path,
    modules: nn.ModuleDict,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, float],
) -> Path:
    """Write ``checkpoint-STEP`` whole or not at all, then drop the older ones."""
    target, temporary = folder / f"checkpoint-{int(state['step']):08d}", folder / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = [name for name, _ in modules.named_parameters()]
    moments = {
        f"{names[index]}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(_tensors(modules.state_dict()), temporary / "modules.safetensors")
    save_file(_tensors(ema.state_dict()), temporary / "ema.safetensors")
    save_file(_tensors(moments), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    temporary.rename(target)
    _flush(folder)
    for old in sorted(folder.glob("checkpoint-*"))[:-1]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    folder: Path, modules: nn.ModuleDict, ema: AveragedModel, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Restore the newest checkpoint in place and return its state; step 0 when there is none."""
    found = sorted(folder.glob("checkpoint-*"))
    if not found:
        return {"step": 0, "seconds": 0.0}
    modules.load_state_dict(load_file(found[-1] / "modules.safetensors"))
    ema.load_state_dict(load_file(found[-1] / "ema.safetensors"))
    moments = load_file(found[-1] / "optimizer.safetensors")
    for name, parameter in modules.named_parameters():
        entry = optimizer.state[parameter]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            stored = moments[f"{name}.{key}"]
            # The fused optimiser walks memory linearly: a moment must have its weight's strides.
            same = stored.shape == parameter.shape
            entry[key] = torch.empty_like(parameter).copy_(stored) if same else stored
    return json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
