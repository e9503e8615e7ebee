"""Run folders that are there already: opened, and their configuration read back."""

from __future__ import annotations

from typing import Any

from sampler.config import Config, checked
from sampler.runs.folder import Run
from sampler.runs.session import Place
from sampler.runs.store import LocalStore, open_store
from sampler.types import SamplerError


def opened(where: str, place: Place | None = None) -> Run:
    """The run in a folder or at a URL. Raises SamplerError (2) where there is none."""
    store = open_store(where, place.rank if place else 0)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise SamplerError(f"{where} is no run folder: there is no such folder.", 2)
    return Run(store)


def config_of(run: Run) -> Config:
    """The configuration that a run is gone on with: its model, output and error policy."""
    tree: dict[str, Any] = {
        name: run.config[name] for name in ("model", "output", "errors") if name in run.config
    }
    return checked(tree, {(): f"{run.store.where}/run.json"})
