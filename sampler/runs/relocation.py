"""Paths in a run, resolved again after the run or the files have moved.

run.json records where a run began: the working directory and the folder of the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sampler.bundled import BUNDLED_PARTS
from sampler.config.model import ModelConfig
from sampler.models.lora_files import parse_lora
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import JobSettings

MODEL_PATHS = ("path", "config", "vae", "student", "weak")  # and controlnet, a list
WEIGHTED_PATHS = ("lora", "ip_adapter")  # lists of PATH[:WEIGHT]
_CALIBRATED = "calibrated:"


def find_again(path: str, run: RunFolder) -> str:
    """Path of a file or folder that a run names: the same one, where it is now.

    Looked for where it lies relative to the run, where it was, and relative to the working
    directory, in this order; unchanged if it is nowhere, as for the ids of a hub.
    """
    given = os.path.expanduser(path)
    cwd, folder = run.origin.get("cwd"), run.origin.get("folder")
    places = [given]
    if cwd is not None:
        places.insert(0, os.path.join(cwd, given))
    if cwd is not None and folder is not None and "://" not in run.store.where:
        relative = os.path.relpath(os.path.join(cwd, given), folder)
        places.insert(0, os.path.normpath(os.path.join(run.store.where, relative)))
    return next((os.path.abspath(place) for place in places if os.path.exists(place)), path)


def model_again(model: ModelConfig, run: RunFolder) -> ModelConfig:
    """The model section of a run with its files where they are now."""
    return _with_paths(model, lambda path: find_again(path, run))


def absolute(model: ModelConfig) -> ModelConfig:
    """The model section with absolute paths, for processes with other working directories."""

    def move(path: str) -> str:
        found = os.path.expanduser(path)
        return os.path.abspath(found) if os.path.exists(found) else path

    return _with_paths(model, move)


def _with_paths(model: ModelConfig, move: Callable[[str], str]) -> ModelConfig:
    found: dict[str, Any] = {
        name: move(value)
        for name in MODEL_PATHS
        if (value := getattr(model, name)) is not None and value not in BUNDLED_PARTS
    }
    for name in WEIGHTED_PATHS:
        pairs = [(move(path), weight) for path, weight in map(parse_lora, getattr(model, name))]
        found[name] = tuple(f"{path}:{weight!r}" for path, weight in pairs)
    return replace(model, **found, controlnet=tuple(map(move, model.controlnet)))


def groups_again(run: RunFolder) -> list[JobSettings]:
    """Settings to compute with: those of a run, with the files that they name where they are now.

    Keys and records keep the paths that were given.
    """
    return [
        replace(
            group,
            sampler=_spec(group.sampler, run),
            guidance=_spec(group.guidance, run),
            inputs=_spec(group.inputs, run),
        )
        for group in run.groups
    ]


def _spec(value: Any, run: RunFolder) -> Any:
    if isinstance(value, Mapping):
        return {name: _spec(inner, run) for name, inner in value.items()}
    if isinstance(value, list):
        return [_spec(inner, run) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(_CALIBRATED):
        return _CALIBRATED + _spec(value.removeprefix(_CALIBRATED), run)
    has_ending = os.path.splitext(value)[1] != ""  # words are no files
    found = find_again(value, run) if has_ending else value
    return found if os.path.isfile(found) else value
