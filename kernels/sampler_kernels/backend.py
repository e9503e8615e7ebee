"""The one place where it is decided who computes: the reference (plain torch) or Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("auto", "reference", "triton")

# Elements from which a formula is compiled on a CPU; below, plain torch works in the caches.
LARGE = 2**19

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


def requested() -> str:
    """The backend that is asked for: by `use_backend`, else by SAMPLER_KERNELS, else "auto".

    Raises ValueError where the variable names an unknown one.
    """
    name = _chosen.get()
    return name or _checked(os.environ.get("SAMPLER_KERNELS") or "auto", "SAMPLER_KERNELS")


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `settle` and `gram` serve lazy values that stand on `tensor`.

    "auto": Triton on CUDA and ROCm devices where it works, plain torch elsewhere and for float64;
    compiled for large tensors on a CPU.
    """
    from sampler_kernels import selection, torch_ops

    if selection.triton(tensor.device, tensor.dtype):
        from sampler_kernels import fused

        return fused
    if tensor.numel() >= LARGE and selection.compiles(tensor.device, tensor.dtype):
        from sampler_kernels import compiled

        return compiled
    return torch_ops


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}; one of {', '.join(NAMES)}.")
    return name
