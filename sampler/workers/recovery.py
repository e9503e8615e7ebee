"""What goes wrong with numbers and memory: seen, and got over where that is possible."""

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
    """The decoder in float32, for this once; None where it is in float32 already.

    half -> float32 -> half is exact, so the decoder comes back as it was.
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


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known.lower() in text for known in _MEMORY)


def free_memory() -> None:
    """Gives cached memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def finite(values: Tensor) -> Tensor:
    """Per row [B], whether all its elements are finite; one pass, NaN and infinity both show."""
    if values.device.type == "cpu":  # a whole reduction is vectorised there, one along a dim is not
        low, high = map(torch.stack, zip(*map(torch.aminmax, values), strict=True))
    else:
        low, high = torch.aminmax(values.flatten(1), dim=1)
    return torch.isfinite(low) & torch.isfinite(high)
