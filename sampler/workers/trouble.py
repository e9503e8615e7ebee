"""What goes wrong with numbers and memory: seen, and got over where that is possible."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "hipErrorOutOfMemory",
)


def to_pixels(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [0, 1] as uint8 [B, H, W, 3]; rounded on the device, as diffusers."""
    scaled = (images.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def decode_float32(adapter: Any, latents: Tensor) -> Tensor | None:
    """The decoder in float32, for this once; None where it is in float32 already.

    half -> float32 -> half is exact, so the decoder comes back as it was.
    """
    vae = getattr(adapter.pipe, "vae", None)
    before = getattr(vae, "dtype", None)
    if vae is None or before not in (torch.float16, torch.bfloat16):
        return None
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
    low, high = torch.aminmax(values.flatten(1), dim=1)
    return torch.isfinite(low) & torch.isfinite(high)
