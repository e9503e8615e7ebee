"""Samplers, guidance rules and reward fine-tuners as small strategies over diffusers pipelines.

    engine = sampler.load()
    result = engine.generate(["a red apple on a blue background"], steps=20,
                             sampler="ddim", guidance={"name": "cfg", "scale": 3})

Nothing heavy is imported before it is used: `import sampler` takes milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sampler.batch import Result
    from sampler.denoisers import denoiser
    from sampler.engine import Engine
    from sampler.finetune.api import finetune
    from sampler.guidance.f_divergence import f_weight
    from sampler.images import start_from
    from sampler.loading import load
    from sampler.pipelines.hook import guide
    from sampler.pipelines.scheduler import scheduler
    from sampler.registry import build, describe, names, register
    from sampler.schedule import Schedule
    from sampler.snapshots import load_snapshot, save_snapshot
    from sampler.types import (
        Branch,
        Cond,
        GuidanceBase,
        Level,
        Lin,
        Move,
        Prediction,
        SamplerBase,
        SamplerError,
        Snapshot,
        Span,
        gram,
        settle,
    )

__version__ = "0.1.0"

# module -> the public names it has; the imports above tell the same to type checkers
_HOMES = {
    "batch": "Result",
    "denoisers": "denoiser",  # a module called as a function of the package would hide it
    "engine": "Engine",
    "finetune.api": "finetune",
    "guidance.f_divergence": "f_weight",
    "images": "start_from",
    "loading": "load",
    "pipelines.hook": "guide",
    "pipelines.scheduler": "scheduler",
    "registry": "build describe names register",
    "schedule": "Schedule",
    "snapshots": "load_snapshot save_snapshot",
    "types": "Branch Cond GuidanceBase Level Lin Move Prediction SamplerBase SamplerError "
    "Snapshot Span gram settle",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Branch",
    "Cond",
    "Engine",
    "GuidanceBase",
    "Level",
    "Lin",
    "Move",
    "Prediction",
    "Result",
    "SamplerBase",
    "SamplerError",
    "Schedule",
    "Snapshot",
    "Span",
    "build",
    "denoiser",
    "describe",
    "f_weight",
    "finetune",
    "gram",
    "guide",
    "load",
    "load_snapshot",
    "names",
    "register",
    "save_snapshot",
    "scheduler",
    "settle",
    "start_from",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"sampler.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sampler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """`sampler.finetune` is a function, and there is a subpackage of that name: importing it must
    not put a module in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
