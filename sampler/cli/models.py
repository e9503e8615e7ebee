"""From a configuration's `model` section to an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sampler.bundled import BUNDLED, BUNDLED_PARTS
from sampler.config.model import load_arguments
from sampler.core.errors import ModelError, SamplerError, UsageError, first_line

if TYPE_CHECKING:
    from sampler.cli.options import ModelOptions
    from sampler.config.model import ModelConfig
    from sampler.engine import Engine

# The variables by which people choose the number of threads.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def load_engine(model: ModelConfig, download: bool = False) -> Engine:
    """The engine of a model, on its device.

    Raises SamplerError: 2 for a device that is not there, 6 for a model that cannot be loaded.
    """
    import torch

    import sampler

    if model.device != "auto":
        _check_device(model.device)
    if recorded_name(model) in BUNDLED_PARTS and not any(name in os.environ for name in _THREADS):
        # Its tensors are too small to share: a second thread costs more in waiting than it gives.
        torch.set_num_threads(1)
    try:
        engine = sampler.load(model.path, download=download, **load_arguments(model))
        return engine.with_grid(model.grid)
    except (SamplerError, ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = f"{recorded_name(model)} cannot be loaded: {first_line(error)}"
        raise ModelError(text) from error


def model_config(model: ModelOptions) -> ModelConfig:
    """The section `model` of the options of a command line. Raises UsageError."""
    from sampler.config.schema import validated

    return validated({"model": model}, {}).model


def recorded_name(model: ModelConfig) -> str:
    """Return the model's name for records: the last part of a path, no folders of this machine."""
    if model.path in (None, *BUNDLED_PARTS):
        return model.path or BUNDLED
    if os.path.isdir(model.path):
        return os.path.basename(os.path.normpath(model.path))
    return model.path


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError):
        raise UsageError(
            f"The device {name!r} is not available here; `sampler doctor` lists the devices."
        ) from None
