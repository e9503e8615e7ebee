"""Selects the backend of a tensor: the reference (plain torch) or Triton."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def backend(tensor: Tensor) -> ModuleType:
    """The module whose `settle`, `gram` and `recorded` serve lazy values over `tensor`.

    "auto": Triton on CUDA and ROCm devices where it works; plain torch elsewhere and for float64.
    """
    import sampler_kernels.selection as selection  # late: it imports torch

    if selection.triton(tensor.device, tensor.dtype):
        import sampler_kernels.fused as fused  # late: it imports triton, which may be missing

        return fused
    import sampler_kernels.torch_ops as torch_ops

    return torch_ops
