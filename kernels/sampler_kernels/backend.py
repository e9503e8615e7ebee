"""The one place where it is decided who computes: the reference (plain torch) or Triton."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("auto", "reference", "triton")

_chosen: ContextVar[str | None] = ContextVar("sampler_kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, latent-sized arithmetic runs on this backend: "auto", "reference" or "triton".

    It wins over the environment variable SAMPLER_KERNELS. Raises ValueError for another name.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `settle` and `gram` serve lazy values that stand on `tensor`.

    Raises ValueError where SAMPLER_KERNELS or `use_backend` names an unknown backend.
    """
    name = _chosen.get()
    if name is None:
        name = os.environ.get("SAMPLER_KERNELS", "auto")
        if name != "auto":
            _checked(name, "SAMPLER_KERNELS")
    from sampler_kernels import torch_ops

    if name == "reference" or (name == "auto" and not tensor.is_cuda):
        return torch_ops
    import torch

    if tensor.dtype == torch.float64 or not _works(str(tensor.device)):
        return torch_ops
    from sampler_kernels import fused

    return fused


@cache
def _works(device: str) -> bool:
    """Whether Triton computes correctly there; if not, says so once."""
    try:
        from sampler_kernels.probe import check

        check(device)
    except Exception as error:  # whatever a broken compiler, driver or installation raises
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"The Triton kernels do not work on {device} ({type(error).__name__}: {reason[0]}); "
            "plain torch computes instead. SAMPLER_KERNELS=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}; one of {', '.join(NAMES)}.")
    return name
