"""Run folders that are there already: opened, and their configuration read back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sampler.config.schema import Config, checked
from sampler.errors import ModelError, SamplerError, UsageError
from sampler.runs import fingerprint
from sampler.runs.folder import RunFolder
from sampler.runs.location import RunLocation
from sampler.runs.store import LocalStore, open_store

if TYPE_CHECKING:
    from sampler.engine import Engine


def open_run(where: str, location: RunLocation | None = None) -> RunFolder:
    """The run in a folder or at a URL. Raises SamplerError (2) where there is none."""
    store = open_store(where, location.rank if location else 0)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise UsageError(f"{where} is no run folder: there is no such folder.")
    return RunFolder(store)


def config_of(run: RunFolder) -> Config:
    """The configuration that a run is gone on with: its model, output and error policy."""
    tree: dict[str, Any] = {
        name: run.config[name] for name in ("model", "output", "errors") if name in run.config
    }
    return checked(tree, {(): f"{run.store.where}/run.json"})


def engine_of(run: RunFolder, config: Config, device: str | None = None) -> Engine:
    """The engine of a run, if its model is the one that the run was planned for.

    Raises SamplerError (6) where it is another.
    """
    from sampler.cli.models import load_engine

    check_model(run, config)
    model = replace(config.model, device=device) if device else config.model
    engine = load_engine(model)
    if run.model.fingerprint.startswith("tensors:"):
        from sampler.workers.from_python import model_in_memory

        if model_in_memory(engine).fingerprint != run.model.fingerprint:
            raise _another(run)
    return engine


def check_model(run: RunFolder, config: Config) -> None:
    """Whether the files of the model are those of the run; without loading it."""
    if run.model.fingerprint.startswith("tensors:"):
        return  # a pipeline that was in memory: known only when it is loaded
    model, fast = config.model, run.model.fingerprint.startswith("fast")
    found = fingerprint.model_of(model.path, model.revision, model.dtype, fast)
    found = fingerprint.with_lora(found, model.lora, model.student)
    if found.fingerprint != run.model.fingerprint:
        raise _another(run)


def _another(run: RunFolder) -> SamplerError:
    return ModelError(
        f"{run.store.where} was made with another model than {run.model.label} is now; "
        "go on where that model is, or with engine.generate(..., out=...).",
    )


def index_of(run: RunFolder, key: str) -> int:
    """The number of the job whose key starts so, or that has this number.

    Raises SamplerError (2) where that is none, or several.
    """
    if key.isdigit() and len(key) < 8 and int(key) < run.total:
        return int(key)
    found = [index for index in range(run.total) if run.key(index).startswith(key)] if key else []
    if len(found) != 1:
        problem = "no image" if not found else f"{len(found)} images"
        raise UsageError(f"{run.store.where} has {problem} with the key {key!r:.40}.")
    return found[0]
