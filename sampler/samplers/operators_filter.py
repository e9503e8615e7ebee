"""Blur and downsampling: linear filters, with a pseudo-inverse by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import DocInfo, Ge, Predicate
from torch import Tensor

from sampler.registry.constraints import Count, Positive, checked

# Conjugate-gradient iterations of a pseudo-inverse. Stopping early keeps the directions that the
# filter has all but erased, where noise would be blown up, out of the result.
_ITERATIONS = 12


@checked("superres")
@dataclass(frozen=True)
class SuperResolution:
    """A(x) is smaller by `factor`: "average" pools blocks, "bicubic" filters and subsamples.

    A_dagger: for "average" the exact pseudo-inverse (each value repeated), for "bicubic" the
    least-squares solution by conjugate gradients, stopped early.
    """

    factor: Count = 4
    method: Literal["average", "bicubic"] = "average"

    def A(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"superres: {height} x {width} is not a multiple of factor = {self.factor}."
            )
        if self.method == "average":
            return F.avg_pool2d(x, self.factor)
        size = (height // self.factor, width // self.factor)
        return F.interpolate(x, size, mode="bicubic", antialias=True)

    def A_dagger(self, y: Tensor) -> Tensor:
        start = y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return start if self.method == "average" else least_squares(self.A, y, start)


def _is_odd(size: int) -> bool:
    return size % 2 == 1


@checked("deblur")
@dataclass(frozen=True)
class Deblur:
    """A(x) = kernel * x, edges reflected; a fixed kernel of odd size that sums to 1.

    kind: "gaussian" (sigma pixels), "uniform" (a square), or "motion" (a line at `angle` degrees).
    size: of the kernel, odd, in pixels. A_dagger: least squares by conjugate gradients, stopped
    early.
    """

    kind: Literal["gaussian", "uniform", "motion"] = "gaussian"
    size: Annotated[int, Ge(1), Predicate(_is_odd), DocInfo("a positive odd number")] = 9
    sigma: Positive = 2.0
    angle: float = 30.0

    def kernel(self) -> Tensor:
        """The kernel [size, size], float64."""
        offset = torch.arange(self.size, dtype=torch.float64) - self.size // 2
        y, x = torch.meshgrid(offset, offset, indexing="ij")
        if self.kind == "gaussian":
            weights = torch.exp(-(x**2 + y**2) / (2 * self.sigma**2))
        elif self.kind == "uniform":
            weights = torch.ones_like(x)
        else:
            across = math.sin(math.radians(self.angle)) * x + math.cos(math.radians(self.angle)) * (
                y
            )
            inside = x**2 + y**2 <= (self.size / 2) ** 2
            weights = (1 - across.abs()).clamp(min=0) * inside
        return weights / weights.sum()

    def A(self, x: Tensor) -> Tensor:
        margin, channels = self.size // 2, x.shape[1]
        kernel = self.kernel().to(x).expand(channels, 1, -1, -1)
        return F.conv2d(F.pad(x, (margin,) * 4, mode="reflect"), kernel, groups=channels)

    def A_dagger(self, y: Tensor) -> Tensor:
        return least_squares(self.A, y, y)


def least_squares(
    operator: Callable[[Tensor], Tensor], y: Tensor, start: Tensor, iterations: int = _ITERATIONS
) -> Tensor:
    """min ‖A x − y‖² from x = start, by conjugate gradients on the normal equations, per row.

    A must be linear; its transpose is taken by automatic differentiation.
    """

    def transpose(residual: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = torch.zeros_like(start, requires_grad=True)
            return torch.autograd.grad(operator(leaf), leaf, residual)[0]

    def square(v: Tensor) -> Tensor:
        return v.flatten(1).square().sum(1).view(-1, *(1,) * (v.ndim - 1))

    with torch.no_grad():
        x, residual = start, y - operator(start)
        gradient = direction = transpose(residual)
        norm = square(gradient)
        for _ in range(iterations):
            image = operator(direction)
            length = norm / square(image).clamp(min=1e-30)
            x, residual = x + length * direction, residual - length * image
            gradient = transpose(residual)
            before, norm = norm, square(gradient)
            direction = gradient + norm / before.clamp(min=1e-30) * direction
    return x
