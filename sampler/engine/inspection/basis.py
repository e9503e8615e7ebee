"""The denoiser's Jacobian at one image: its trace, asymmetry and leading eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FULL = 2048  # elements up to which the whole Jacobian is computed
Denoise = Callable[[Tensor], Tensor]  # y [R, ...] -> D(y) [R, ...]


class Basis(NamedTuple):
    """Numbers of the Jacobian J = ∂D/∂y of a denoiser D at y = x0 + q·n, n elements.

    trace, and its standard error (0 for the whole Jacobian); predicted: q²·trace J, the expected
    squared error of an exact denoiser; sure: ‖D − y‖² − n·q² + 2q²·trace J, Stein's unbiased
    estimate of ‖D − x0‖²; asymmetry: ‖J − Jᵀ‖/‖J‖, 0 for an exact denoiser; affine: ‖D − J·y‖/‖D‖,
    0 for networks without bias terms; values [k], vectors [k, ...]: leading eigenpairs of
    (J + Jᵀ)/2, descending; denoised: D.
    """

    trace: float
    trace_error: float
    predicted: float
    sure: float
    asymmetry: float
    affine: float
    values: Tensor
    vectors: Tensor
    denoised: Tensor


def basis(
    denoise: Denoise, y: Tensor, q: float, signs: int = 24, count: int = 12, rounds: int = 5,
    full: bool = False, seed: int = 0,
) -> Basis:  # fmt: skip
    """Inspect a denoiser D at y [1, ...] = x0 + q·n.

        J = Cov[x0 | y]/q²      for an exact posterior mean: symmetric, no eigenvalue below 0

    J·z is a central difference, Jᵀ·z a backward pass. signs: random sign vectors of the estimates
    of trace and asymmetry. count, rounds: vectors and iterations of the subspace iteration for the
    eigenpairs. full: the whole J instead, for at most 2,048 elements. seed: of all random numbers.

    Raises ValueError for a y of several rows and for full with too many elements.

    Reference: Generalization in Diffusion Models Arises from Geometry-Adaptive Harmonic
    Representations (Kadkhodaie et al., 2024), arXiv:2310.02557.
    """
    size = y[0].numel()
    if len(y) != 1 or (full and size > MAX_FULL):
        raise ValueError(
            f"basis: {len(y)} images of {size} elements; give one, of at most {MAX_FULL} elements "
            "with full."
        )
    draw = torch.Generator().manual_seed(seed)
    denoised = denoise(y)
    own = _Jacobian(denoise, y)
    if full:
        rows = own.times(torch.eye(size, dtype=y.dtype, device=y.device).view(size, *y.shape[1:]))
        j = rows.flatten(1).T
        trace, error = float(j.trace()), 0.0
        asymmetry = float((j - j.T).norm() / j.norm())
        values, vectors = torch.linalg.eigh((j + j.T) / 2)
        values, vectors = values.flip(0)[:count], vectors.flip(1).T[:count]
    else:
        z = torch.randint(0, 2, (signs, *y.shape[1:]), generator=draw).to(y) * 2 - 1
        forward, backward = own.times(z).flatten(1), own.transposed(z).flatten(1)
        each = (forward * z.flatten(1)).sum(1)
        trace, error = float(each.mean()), float(each.std() / math.sqrt(signs))
        asymmetry = float((forward - backward).norm() / forward.norm())
        values, vectors = _leading(own, count, rounds, draw)
    scale = q * q
    sure = float((denoised - y).square().sum()) - size * scale + 2 * scale * trace
    affine = float((denoised - own.times(y)).norm() / denoised.norm())
    return Basis(
        trace, error, scale * trace, sure, asymmetry, affine, values,
        vectors.reshape(-1, *y.shape[1:]), denoised,
    )  # fmt: skip


class _Jacobian:
    """Products with J and Jᵀ at a point."""

    def __init__(self, denoise: Denoise, y: Tensor) -> None:
        self.denoise, self.y = denoise, y
        # Balances the rounding of the difference against its truncation.
        unit = torch.finfo(y.dtype).eps ** (1 / 3)
        self.step = unit * max(1.0, float(y.square().mean().sqrt()))

    def times(self, z: Tensor) -> Tensor:
        """J·z of rows z [K, ...], by central differences along z scaled to elements of size 1."""
        shape = (-1, *[1] * (z.ndim - 1))
        size = z.flatten(1).square().mean(1).sqrt().clamp(min=1e-30).view(shape)
        # A unit vector has small elements: at most its norm is divided by.
        size = size * math.sqrt(z[0].numel()) if bool((size < 0.1).all()) else size
        move = self.step * z / size
        ends = self.denoise(torch.cat([self.y + move, self.y - move]))
        above, below = ends.split_with_sizes([len(z), len(z)])
        return (above - below) / (2 * self.step) * size

    def transposed(self, z: Tensor) -> Tensor:
        """Jᵀ·z of rows z [K, ...], by one backward pass."""
        with torch.enable_grad():
            leaf = self.y.expand(z.shape).clone().requires_grad_()
            (slope,) = torch.autograd.grad((self.denoise(leaf) * z).sum(), leaf)
        return slope


def _leading(
    own: _Jacobian, count: int, rounds: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs (values [k], vectors [k, n]) of (J + Jᵀ)/2 in an iterated subspace."""
    y = own.y
    count = min(count, y[0].numel())
    space = torch.randn(y[0].numel(), count, generator=draw, dtype=torch.float64).to(y)
    space = torch.linalg.qr(space)[0]
    for _ in range(rounds):
        image = own.times(space.T.reshape(count, *y.shape[1:])).flatten(1).T
        space = torch.linalg.qr(image)[0]
    image = own.times(space.T.reshape(count, *y.shape[1:])).flatten(1).T
    small = space.T @ image
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0), (space @ rotation.flip(1)).T
