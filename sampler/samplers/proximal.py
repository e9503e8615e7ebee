"""Proximal step on a measurement: the x that fits y and stays near a centre.

    argmin_x  ‖y − A(x)‖²/(2·s²) + ‖x − c‖²/(2·r²)

By Gauss–Newton steps, whose linear systems conjugate gradients solve: A by forward-mode, its
transpose by reverse-mode differentiation. One step is exact for linear A once the iterations are as
many as A·Aᵀ has distinct eigenvalues. All scalars are per row, so that samples are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sampler.samplers.measurement import Map, Measurement

_forward_ad: Any = torch.autograd.forward_ad  # whose functions have no types


def nearest(
    measured: Measurement,
    y: Tensor,
    centre: Tensor,
    noise: float,
    variance: Any,
    cg: int = 4,
    gn: int = 1,
) -> Tensor:
    """The minimum [B, ...] from x = centre, differentiable in the centre (implicitly).

    y [B or 1, ...]: the measurement; noise: s > 0, its standard deviation in units of [-1, 1];
    variance: r² >= 0, a number or [B]; cg: iterations of each linear system; gn: Gauss–Newton
    steps, of which linear operators need one.

    An operator without forward-mode derivative (a user's autograd.Function) gets a step of steepest
    descent of the length that is exact for the quadratic model instead of the iterations.
    Raises ValueError for an operator that is not differentiable, or with y of another shape.
    """
    s2 = (noise * measured.gain) ** 2
    r2 = torch.as_tensor(variance).to(centre).reshape(-1, *(1,) * (centre.ndim - 1))
    at, ratio = centre.detach(), r2 / s2

    def solve(x: Tensor, transpose: Map, v: Tensor) -> Tensor:
        return _solve(measured.forward, x, transpose, v, ratio, cg)

    x = before = at
    transpose: Map = torch.clone
    with torch.no_grad():
        for _ in range(gn):
            seen, transpose = _linearised(measured, x)
            slope = ratio * transpose(y.to(seen) - seen) - (x - at)
            before, x = x, x + solve(x, transpose, slope)
    if not centre.requires_grad:
        return x

    def jacobian(v: Tensor) -> Tensor:
        return solve(before, transpose, v)

    apply: Any = getattr(_Minimum, "apply")  # noqa: B009 - a classmethod without types
    return apply(centre, x, jacobian)


class _Minimum(torch.autograd.Function):
    """The minimum x as a function of its centre: dx/dc = (I + (r²/s²)·JᵀJ)⁻¹."""

    @staticmethod
    def forward(ctx: Any, centre: Tensor, x: Tensor, solve: Map) -> Tensor:
        ctx.solve = solve
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.solve(grad_outputs[0]), None, None


def _solve(
    forward: Map,
    x: Tensor,
    transpose: Map,
    slope: Tensor,
    ratio: Tensor,
    iterations: int,
) -> Tensor:
    """(I + ratio·JᵀJ)⁻¹ slope by conjugate gradients, J the Jacobian of `forward` at x."""
    try:
        image = _jvp(forward, x, slope)
    except (NotImplementedError, RuntimeError):  # no derivative in this direction of some operation
        curvature = _square(slope) + ratio * _square(_secant(forward, x, slope))
        return _square(slope) / curvature.clamp(min=1e-30) * slope
    out, residual, direction = slope * 0, slope, slope
    norm = _square(slope)
    for k in range(iterations):
        if k:
            image = _jvp(forward, x, direction)
        curvature = _square(direction) + ratio * _square(image, x.ndim)
        length = norm / curvature.clamp(min=1e-30)
        out = out + length * direction
        if k == iterations - 1:
            break
        residual = residual - length * (direction + ratio * transpose(image))
        before, norm = norm, _square(residual)
        direction = residual + norm / before.clamp(min=1e-30) * direction
    return out


def _linearised(measured: Measurement, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(A(x), v -> Jᵀv)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        seen = measured.forward(leaf)
    if not seen.requires_grad:
        raise ValueError(f"{measured.name}: the operator is not differentiable; A(x) has no graph.")
    measured.check(seen, x)

    def transpose(v: Tensor) -> Tensor:
        return torch.autograd.grad(seen, leaf, v.expand_as(seen).to(seen), retain_graph=True)[0]

    return seen.detach(), transpose


def _jvp(forward: Map, x: Tensor, v: Tensor) -> Tensor:
    """J·v by forward-mode differentiation."""
    # the fused kernels of attention have no forward-mode derivative
    with _forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        primal, tangent = _forward_ad.unpack_dual(forward(_forward_ad.make_dual(x, v.to(x))))
        return primal * 0 if tangent is None else tangent


def _secant(forward: Map, x: Tensor, v: Tensor) -> Tensor:
    """J·v by the difference of A over a change of x by 0.01 (root mean square) along v."""
    size = (_square(v) / v[0].numel()).sqrt().clamp(min=1e-30)
    h = 0.01 / size
    change = forward(x + h * v) - forward(x)
    return change / h.reshape(-1, *(1,) * (change.ndim - 1))


def _square(v: Tensor, ndim: int | None = None) -> Tensor:
    """‖v‖² per row, with as many dimensions as v, or `ndim`."""
    return v.flatten(1).square().sum(1).reshape(-1, *(1,) * ((ndim or v.ndim) - 1))
