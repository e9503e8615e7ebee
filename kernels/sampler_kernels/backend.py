"""Selects the backend of a tensor: the reference (plain torch) or Triton."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `settle`, `gram` and `recorded` serve lazy values over `tensor`.

    "auto": Triton on CUDA and ROCm devices where it works; plain torch elsewhere and for float64.
    """
    # Late imports: of torch, and of triton, which may be missing. `import` takes as long as a small
    # torch operation where the module is there already.
    selection = sys.modules.get("sampler_kernels.selection") or _imported("selection")
    name = "fused" if selection.triton(tensor.device, tensor.dtype) else "torch_ops"
    return sys.modules.get("sampler_kernels." + name) or _imported(name)


def _imported(name: str) -> ModuleType:
    return importlib.import_module("sampler_kernels." + name)
