"""Asynchronous device-to-host copies of per-sample flags.

`start_copy` starts the copy as soon as the flags are computed; `wait`, called a step later, finds
them copied. Flags loaded from a snapshot have no pending copy and are fetched synchronously.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COPY = "_sampler_host_copy"


def start_copy(flags: float | Tensor) -> None:
    """Starts a copy of flags [B] to the CPU, once, where they are on another device."""
    if isinstance(flags, float) or flags.device.type == "cpu" or _pending(flags):
        return
    copy = _pinned(flags)
    copy.copy_(flags, non_blocking=True)
    setattr(flags, _COPY, (copy, _recorded_event(flags.device)))


def wait(flags: float | Tensor) -> Tensor | None:
    """Flags as bool [B] on the CPU; None for a number, which holds for every sample."""
    if isinstance(flags, float):
        return None
    start_copy(flags)
    pending = _pending(flags)
    if pending is None:
        return flags.bool()
    copy, event = pending
    event.synchronize()
    return copy.bool()


def _pending(flags: Tensor) -> tuple[Tensor, torch.cuda.Event] | None:
    return getattr(flags, _COPY, None)


def _pinned(flags: Tensor) -> Tensor:
    import torch

    return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)


def _recorded_event(device: torch.device) -> torch.cuda.Event:
    """Event on the current stream of a device, which need not be the current device."""
    import torch

    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event
