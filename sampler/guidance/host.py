"""Numbers of a device that a rule has to look at on the CPU, without stalling the device.

`towards_host` starts the copy when the numbers are made; `on_host`, called a step later, finds them
there. A tensor that was loaded from a snapshot has no copy under way and is fetched as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_COPY = "_sampler_host_copy"


def towards_host(values: Tensor) -> Tensor:
    """The same tensor, with a copy to the CPU under way where it lies on a CUDA or ROCm device."""
    values = values.detach()
    if values.is_cuda:
        import torch

        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        setattr(values, _COPY, (copy, done))
    return values


def on_host(values: Tensor) -> Tensor:
    """The values on the CPU."""
    started = getattr(values, _COPY, None)
    if started is None:
        return values.cpu()
    copy, done = started
    done.synchronize()
    return copy
