"""Detect non-finite values and out-of-memory errors, and recover where possible.

`BatchRunner` halves the batch and retries after an error that is detected here.
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from sampler.core.adapter import PipelineAdapter
from sampler.core.locks import exclusive

_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "hipErrorOutOfMemory",
)


def decode_float32(adapter: PipelineAdapter, latents: Tensor) -> Tensor | None:
    """Decode once with the decoder in float32; None if that is its precision already.

    half -> float32 -> half is exact, so the decoder is unchanged afterwards.
    """
    vae = getattr(adapter.pipe, "vae", None)
    before = getattr(vae, "dtype", None)
    if vae is None or before not in (torch.float16, torch.bfloat16):
        return None
    with exclusive(vae):
        try:
            vae.to(torch.float32)
            return adapter.decode(latents.float())
        finally:
            vae.to(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Detect out-of-memory errors of Python, torch and the device libraries."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known.lower() in text for known in _MEMORY)


def free_memory() -> None:
    """Release cached memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_finite(values: Tensor) -> Tensor:
    """Flag [B] of samples whose elements are all finite, in one pass."""
    if values.device.type == "cpu":  # where a full reduction is vectorised, one along a dim is not
        low, high = map(torch.stack, zip(*map(torch.aminmax, values), strict=True))
    else:
        low, high = torch.aminmax(values.flatten(1), dim=1)
    return torch.isfinite(low) & torch.isfinite(high)
