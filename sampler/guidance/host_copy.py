"""Asynchronous device-to-host copies of per-row flags.

`start_copy` queues the copy as soon as the flags are computed; `wait`, called a step later, finds
it done. Flags that were loaded from a snapshot have no copy under way: `wait` starts it then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COPY = "_sampler_host_copy"


def start_copy(flags: Any) -> None:
    """Queue a copy of flags [B] to the CPU, once; nothing to do for numbers and CPU tensors."""
    if isinstance(flags, float) or flags.device.type == "cpu":
        return
    if getattr(flags, _COPY, None) is not None:
        return
    copy = _pinned(flags)
    copy.copy_(flags, non_blocking=True)
    setattr(flags, _COPY, (copy, _record_event(flags.device)))


def wait(flags: Any) -> Tensor | None:
    """The flags as bool [B] on the CPU; None for a number, which holds for every sample."""
    if isinstance(flags, float):
        return None
    start_copy(flags)
    copy, event = getattr(flags, _COPY, (flags, None))
    if event is not None:
        event.synchronize()
    return copy.bool()


def _pinned(flags: Tensor) -> Tensor:
    import torch

    return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)


def _record_event(device: torch.device) -> Any:
    """An event on the current stream of a device, which need not be the current device."""
    import torch

    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event
