"""Decides whether Triton serves a device: it is requested, it works, and its results are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sampler_kernels.choice import requested
from sampler_kernels.counting import dry


def _triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where Triton serves tensors of this device and type."""
    name = requested()
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return False
    return dtype is not torch.float64 and (dry() or works(device))


# torch.compile bakes the answer into what it compiles, as it does with shapes and devices. The
# decorator is not annotated.
_compiler: Any = torch.compiler
triton: Callable[[torch.device, torch.dtype], bool] = _compiler.assume_constant_result(_triton)


@cache
def works(device: torch.device) -> bool:
    """Return True where the kernels run and their results are right; otherwise warns, once."""
    try:
        from sampler_kernels.probe import check

        check(device)
    except Exception as error:  # any error of a broken compiler, driver or installation
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            reason = "the extra 'triton' is not installed: pip install diffusion-sampler[triton]"
        else:
            reason = f"{type(error).__name__}: {reason}"
        warnings.warn(
            f"The Triton kernels do not work on {device} ({reason}); "
            "plain torch computes instead. SAMPLER_KERNELS=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
