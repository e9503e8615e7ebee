"""Checkpoints: folders that are written atomically.

    checkpoints/000010/   adapter.safetensors  optimizer.safetensors  state.json

A folder is written under a temporary name, flushed to disk with its files, then renamed; older
ones are removed only afterwards. Nothing is pickled. Random states are not stored: every draw is a
function of (seed, update, sample).
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from sampler.core.durable import TEMPORARY, write_file, write_folder
from sampler.core.errors import first_line

FORMAT = 1


class Checkpoint(NamedTuple):
    """update: number of updates done; adapter, optimizer: tensors; state: plain data."""

    update: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint below `root` and remove all but the newest `keep`."""
    final = root / f"{checkpoint.update:06d}"
    with write_folder(final) as folder:
        write_file(folder / "adapter.safetensors", save(checkpoint.adapter))
        write_file(folder / "optimizer.safetensors", save(checkpoint.optimizer))
        record = {"format": FORMAT, "update": checkpoint.update, **checkpoint.state}
        write_file(folder / "state.json", json.dumps(record).encode())
    remove_old(root, checkpoint.update, keep)
    return final


def remove_old(root: Path, update: int, keep: int) -> None:
    """Remove the checkpoints up to an update but the newest `keep` of them."""
    for old in [p for p in complete(root) if int(p.name) <= update][:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(root: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint, or None; remove leftovers of killed writers.

    Warns of those that cannot be read: a run goes on before them, or from its beginning.
    """
    if root.is_dir():
        for entry in root.iterdir():
            if entry.name.startswith(TEMPORARY):
                shutil.rmtree(entry, ignore_errors=True)
    for folder in reversed(complete(root)):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if (found := state.pop("format")) != FORMAT:
                raise ValueError(f"its format is {found}, not {FORMAT}")
            adapter = load_file(folder / "adapter.safetensors")
            optimizer = load_file(folder / "optimizer.safetensors")
            return Checkpoint(state.pop("update"), adapter, optimizer, state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(
                f"The checkpoint {folder} cannot be read ({first_line(error)}): the run goes on "
                "from the one before, or from its start.",
                stacklevel=2,
            )
    return None


def complete(root: Path) -> list[Path]:
    """Return the checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the moments and step counts of AdamW under the keys "parameter number.name"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value.detach().cpu()
        for number, entry in state.items()
        for key, value in entry.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
