"""Flags of a device that a rule has to look at on the CPU, without stalling the device.

`towards_host` starts the copy as soon as the flags are there; `on_host`, called a step later, finds
them copied. Flags that were loaded from a snapshot have no copy under way and are fetched as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_COPY = "_sampler_host_copy"


def towards_host(flags: Any) -> None:
    """Starts a copy of flags [B] to the CPU, once, where they lie elsewhere."""
    if isinstance(flags, float) or flags.device.type == "cpu" or hasattr(flags, _COPY):
        return
    copy = _pinned(flags)
    copy.copy_(flags, non_blocking=True)
    setattr(flags, _COPY, (copy, _marked()))


def on_host(flags: Any) -> Tensor | None:
    """The flags as bool [B] on the CPU; None for a number, which holds for every row."""
    if isinstance(flags, float):
        return None
    towards_host(flags)
    copy, done = getattr(flags, _COPY, (flags, None))
    if done is not None:
        done.synchronize()
    return copy.bool()


def _pinned(flags: Tensor) -> Tensor:
    import torch

    return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)


def _marked() -> Any:
    """The point that the device's current stream has reached by now."""
    import torch

    done = torch.cuda.Event()
    done.record()
    return done
