"""Whether Triton computes on a device: asked for, possible, and seen to be right."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from sampler_kernels.backend import requested
from sampler_kernels.counting import dry


# torch.compile bakes the answer into what it compiles, as it does with shapes and devices.
@torch.compiler.assume_constant_result
def triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton serves tensors of this device and type."""
    name = requested()
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return False
    return dtype is not torch.float64 and (dry() or works(str(device)))


def compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether large tensors of this device and type are computed by compiled formulas."""
    if torch.compiler.is_compiling():  # who traces compiles already
        return False
    return device.type == "cpu" and dtype is not torch.float64 and requested() == "auto"


@cache
def works(device: str) -> bool:
    """Whether the kernels run there and answer rightly; if not, a warning says so, once."""
    try:
        from sampler_kernels.probe import check

        check(device)
    except Exception as error:  # whatever a broken compiler, driver or installation raises
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
