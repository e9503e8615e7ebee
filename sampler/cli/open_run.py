"""Existing run folders: open one, read its configuration, load its engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sampler.cli.options import ModelOptions
from sampler.config.model import ModelConfig
from sampler.config.schema import Config, validated
from sampler.core.errors import ModelError, SamplerError, UsageError
from sampler.runs import fingerprint
from sampler.runs.folder import RunFolder
from sampler.runs.jobs import Model, model_differences
from sampler.runs.location import RunLocation
from sampler.runs.relocation import model_again
from sampler.runs.store import LocalStore, open_store

if TYPE_CHECKING:
    from sampler.engine import Engine


def open_run(where: str, location: RunLocation | None = None) -> RunFolder:
    """Open the run in a folder or at a URL. Raises UsageError if there is none."""
    store = open_store(where, location.rank if location else 0)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise UsageError(f"{where} is not a run folder: there is no such folder.")
    return RunFolder(store)


def split_key(what: str) -> tuple[str, str]:
    """(run folder, key) of RUN#KEY; (path, "") of a path, which may hold # too."""
    path = os.path.expanduser(what)
    where, mark, key = path.rpartition("#")
    return (path, "") if os.path.exists(path) or not mark else (where, key)


def config_of(run: RunFolder) -> Config:
    """Recorded configuration of a run: its model, output and error policy.

    Paths of the model are those of today, if the run or the files have moved.
    """
    tree: dict[str, Any] = {
        name: run.config[name] for name in ("model", "output", "errors") if name in run.config
    }
    config = validated(tree, {(): f"{run.store.where}/run.json"})
    return replace(config, model=model_again(config.model, run))


def engine_of(run: RunFolder, model: ModelConfig) -> Engine:
    """Load the engine of a run. Raises ModelError if the model is not the planned one."""
    from sampler.cli.models import load_engine

    check_model(run, model)
    engine = load_engine(model)
    if run.model.fingerprint.startswith("tensors:"):
        from sampler.workers.in_memory import model_in_memory

        found = model_in_memory(engine)
        if different := model_differences(run.model.identity, found.identity):
            raise _other_model(run, different)
    return engine


def with_model(config: Config, model: ModelOptions) -> Config:
    """The configuration with the model options of a command line over those of the run."""
    given = validated({"model": model}, {}).model
    values = {name: getattr(given, name) for name in model}
    return replace(config, model=replace(config.model, **values))


def check_model(run: RunFolder, model: ModelConfig) -> None:
    """Compare the model files with the run's fingerprint. Raises ModelError."""
    if run.model.fingerprint.startswith("tensors:"):
        return  # a pipeline in memory, compared after loading
    try:
        found = fingerprint.model_of(model, run.model.fingerprint.startswith("fast"))
    except ModelError as error:
        raise ModelError(
            f"The model of {run.store.where} has changed: {str(error).rstrip('.')}; give the "
            "new location of moved files with --model, --lora and the other options."
        ) from error
    if different := model_differences(run.model.identity, comparable(found, run.model.identity)):
        raise _other_model(run, different)


def comparable(model: Model, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of a model; with the recorded dtype where that is auto, which stands for any."""
    automatic = {"dtype": "auto"} if recorded["dtype"] == "auto" else {}
    return {**model.identity, **automatic}


def _other_model(run: RunFolder, different: list[str]) -> SamplerError:
    return ModelError(
        f"{run.store.where} was generated with another model than {run.model.label} is now "
        f"(different: {', '.join(different)}); name the right files with --model, --lora and the "
        "other options, or continue with engine.generate(..., out=...)."
    )


def index_of(run: RunFolder, key: str) -> int:
    """Number of the job with this number or key prefix. Raises UsageError for none or several."""
    if key.isdigit() and len(key) < 8 and int(key) < run.total:
        return int(key)
    found = [index for index in range(run.total) if run.key(index).startswith(key)] if key else []
    if len(found) != 1:
        problem = "no image" if not found else f"{len(found)} images"
        raise UsageError(f"{run.store.where} has {problem} with the key {key!r:.40}.")
    return found[0]
