"""From a configuration's `model` section to an engine, with the libraries kept quiet."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sampler.types import SamplerError

if TYPE_CHECKING:
    from sampler.config import ModelConfig
    from sampler.engine import Engine

BUNDLED = "bundled"
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# The variables by which people choose the number of threads.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def load_engine(model: ModelConfig, verbose: bool = False) -> Engine:
    """The engine of a model, on its device.

    Raises SamplerError: 2 for a device that is not there, 6 for a model that cannot be loaded.
    """
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    import torch

    import sampler

    device = _device(model.device)
    if model_name(model) == BUNDLED and not any(name in os.environ for name in _THREADS):
        # Its tensors are too small to share: a second thread costs more in waiting than it gives.
        torch.set_num_threads(1)
    options: dict[str, Any] = {"revision": model.revision, "variant": model.variant}
    options = {name: value for name, value in options.items() if value is not None}
    if model.dtype != "auto":
        options["dtype"] = getattr(torch, model.dtype)
    try:
        engine = sampler.load(model.path, **options)
        engine.pipeline.pipe.to(device)
    except (SamplerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SamplerError(f"{model.path} cannot be loaded: {reason}", 6) from error
    return engine


def model_name(model: ModelConfig) -> str:
    """What a record calls the model: no folders of this machine, only the last part of a path."""
    if model.path is None or model.path == BUNDLED:
        return BUNDLED
    return (
        os.path.basename(os.path.normpath(model.path)) if os.path.isdir(model.path) else model.path
    )


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise SamplerError(
            f"The device {name!r} is not available here; `sampler doctor` lists the devices.", 2
        ) from None
    return device
