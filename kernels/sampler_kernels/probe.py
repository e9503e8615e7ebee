"""A tiny run of each kernel against plain torch, before a device is used."""

from __future__ import annotations

import torch

from sampler_kernels import fused, torch_ops
from sampler_kernels.counting import count_launches
from sampler_kernels.lin import Lin


def check(device: torch.device) -> None:
    """Raises the error of a launch, and RuntimeError where a kernel gives a wrong result."""
    with torch.no_grad(), count_launches():  # not counted for the caller
        x = torch.linspace(-1, 1, 2 * 1500, device=device).view(2, 1500)
        y = Lin.of(x.square().half())
        right = torch_ops.gram([Lin.of(x), y], None)
        g = fused.gram([Lin.of(x), y], None)
        formula = Lin.of(x) - y * (g[0, 1] / g[1, 1]) / 3.0
        expected = torch_ops.settle([Lin.of(x) - y * (right[0, 1] / right[1, 1]) / 3.0])[0]
        value = fused.settle([formula])[0]
        if not torch.allclose(value, expected, rtol=1e-5, atol=1e-6):
            raise RuntimeError("a kernel gave a wrong result")
