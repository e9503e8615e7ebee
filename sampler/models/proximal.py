"""Learned proximal networks: denoisers that are exactly proximal operators of a prior.

    f(x) = grad psi(x),   psi input-convex and smooth   <=>   f = prox_R,
    prox_R(y) = argmin_x ‖x − y‖²/2 + R(x)
    R(x) = <y, x> − ‖x‖²/2 − psi(y) for x = f(y)

Learned Proximal Networks for Inverse Problems (Fang et al., 2024), arXiv:2310.14344, and its
published code; networks and names of the weights are those of that code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import DocInfo, Predicate
from torch import Tensor, nn

from sampler.registry.constraints import Count, Nonnegative, Positive, checked

# Units of the layer before the last, and the law of the logarithm of the first convolutional
# weights, of the published networks.
_WIDTH, _LOG_MEAN, _LOG_STD = 64, -10.0, 0.1


def _is_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) in (1, 3) and all(size >= 1 for size in shape)


Shape = Annotated[
    tuple[int, ...], Predicate(_is_shape), DocInfo("(D,) or (channels, height, width)")
]


@checked("proximal network")
@dataclass(frozen=True)
class ProximalConfig:
    """Configuration of a network over rows x of a shape (D,) or (channels, height, width).

    hidden: units or channels of a layer. layers: number of layers with skip connections; of
    convolutions every second halves height and width. beta: of the softplus, whose curvature is
    largest at beta/4: 10 for vectors and 28 pixels, 100 for 128 pixels. alpha: weight of ‖x‖² in
    psi, which makes it strongly convex: 0.01 for 28 pixels, 1e-6 for 128 pixels.
    """

    shape: Shape
    hidden: Count = 64
    layers: Count = 4
    beta: Positive = 10.0
    alpha: Nonnegative = 0.0


class Prior(NamedTuple):
    """Values R(x) [B], the points y [B, ...] with f(y) = x, and gaps max|f(y) − x| [B].

    A gap that is not small belongs to an x outside the range of f, where R is infinite.
    """

    value: Tensor
    point: Tensor
    gap: Tensor


class ProximalNetwork(nn.Module):
    """Input-convex network psi and its gradient f: softplus layers with skip connections from x.

        y_1 = act(W_1 x),   y_k = act(W_k y_(k−1) + V_k x),   psi = w·y_K + alpha·‖x‖²

    W_2, ..., w have no negative entry (`clip` after every optimiser step), V_k and W_1 are free.
    Called as fn(x, level, cond) it is a denoiser, `sampler.denoiser(network, prediction="x0")`;
    it was trained for one noise level, so that of a level alpha alone counts: f(x / alpha).
    """

    def __init__(self, config: ProximalConfig) -> None:
        super().__init__()
        self.config = config
        layers = _dense(config) if len(config.shape) == 1 else _convolutional(config)
        self.lin, self.res = (nn.ModuleList(part) for part in layers)
        self.act = nn.Softplus(beta=config.beta)
        if len(config.shape) == 3:
            for weight in self._convex_weights:
                nn.init.normal_(weight, _LOG_MEAN, _LOG_STD).data.exp_()
        self.clip()

    def potential(self, x: Tensor) -> Tensor:
        """Return psi(x) [B] of x [B, *shape]. Raises ValueError for another shape."""
        if tuple(x.shape[1:]) != self.config.shape:
            raise ValueError(
                f"This proximal network takes rows of {self.config.shape}, not of "
                f"{tuple(x.shape[1:])}."
            )
        y = self.act(self.lin[0](x))
        for core, skip in zip(self.lin[1:-1], self.res, strict=False):
            y = core(y if isinstance(core, nn.Conv2d) else y.flatten(1))
            y = self.act(y + skip(self._resized(x, skip, y)))
        psi = self.lin[-1](y)
        if len(self.config.shape) == 1:  # the published network of vectors has one skip more
            psi = psi + self.res[-1](x)
        return psi[:, 0] + self.config.alpha * x.flatten(1).square().sum(1)

    def forward(self, x: Tensor, level: Any = None, cond: Any = None) -> Tensor:
        """Return f(x) [B, *shape]; with a level f(x / alpha), where alpha is above 0.

        The graph is kept where gradients are enabled. The weights' dtype is computed in.
        """
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            point = x.to(self._dtype)
            if level is not None:
                point = point / _scales(level.alpha, x)
            if not keep or not point.requires_grad:
                point = point.detach().clone().requires_grad_()
            (out,) = torch.autograd.grad(self.potential(point).sum(), point, create_graph=keep)
            return out

    @torch.no_grad()
    def clip(self) -> None:
        """Set the negative weights of all layers but the first to 0: psi is convex then."""
        for weight in self._convex_weights:
            weight.clamp_(min=0)

    @property
    def _convex_weights(self) -> list[Tensor]:
        """The weights that may not be negative."""
        return [weight for layer in self.lin[1:] for weight in layer.parameters()]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def prior(self, x: Tensor, iterations: int = 500) -> Prior:
        """Return R(x) of x [B, *shape] by minimising psi(y) − <x, y> over y, row by row.

        The problem is smooth and convex: L-BFGS with a strong Wolfe search (the published code has
        conjugate gradients).
        """
        x = x.detach().to(self._dtype)
        with torch.inference_mode(False), torch.enable_grad():
            points = torch.cat([self._inverse(row[None].clone(), iterations) for row in x])
        with torch.no_grad():
            product = (points * x).flatten(1).sum(1)
            value = product - 0.5 * x.flatten(1).square().sum(1) - self.potential(points)
            gap = (self(points) - x).abs().flatten(1).amax(1)
        return Prior(value, points, gap)

    def _inverse(self, x: Tensor, iterations: int) -> Tensor:
        y = x.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [y],
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            value = self.potential(y)[0] - (x * y).sum()
            (y.grad,) = torch.autograd.grad(value, y)
            return value

        search.step(loss)
        return y.detach()

    def _resized(self, x: Tensor, skip: nn.Module, y: Tensor) -> Tensor:
        """Return x as the input of a skip connection whose result is added to y."""
        if len(self.config.shape) == 1:
            return x
        if isinstance(skip, nn.Conv2d):
            size = tuple(side * step for side, step in zip(y.shape[-2:], skip.stride, strict=True))
            return F.interpolate(x, size, mode="bilinear")
        size = _sides(self.config)[-1]
        return F.interpolate(x, size, mode="bilinear").flatten(1)


def _dense(config: ProximalConfig) -> tuple[list[nn.Module], list[nn.Module]]:
    (size,), hidden = config.shape, config.hidden
    cores = [nn.Linear(hidden, hidden, bias=False) for _ in range(config.layers)]
    skips = [nn.Linear(size, hidden) for _ in range(config.layers)]
    first, last = nn.Linear(size, hidden, bias=False), nn.Linear(hidden, 1, bias=False)
    return [first, *cores, last], [*skips, nn.Linear(size, 1)]


def _convolutional(config: ProximalConfig) -> tuple[list[nn.Module], list[nn.Module]]:
    (channels, _, _), hidden = config.shape, config.hidden
    steps = [2 if k % 2 else 1 for k in range(1, config.layers)]

    def conv(inner: int, step: int, bias: bool) -> nn.Module:
        return nn.Conv2d(inner, hidden, 3, stride=step, padding=1, bias=bias)

    height, width = _sides(config)[-1]
    lin = [conv(channels, 1, False), *(conv(hidden, step, False) for step in steps)]
    lin += [
        nn.Linear(hidden * height * width, _WIDTH, bias=False),
        nn.Linear(_WIDTH, 1, bias=False),
    ]
    res = [conv(channels, step, True) for step in steps]
    return lin, [*res, nn.Linear(channels * height * width, _WIDTH)]


def _sides(config: ProximalConfig) -> list[tuple[int, int]]:
    """Return (height, width) after every convolution."""
    _, height, width = config.shape
    found = [(height, width)]
    for k in range(1, config.layers):
        if k % 2:
            height, width = (height + 1) // 2, (width + 1) // 2
        found.append((height, width))
    return found


def _scales(alpha: Any, x: Tensor) -> Any:
    """Return alpha as a divisor of x; 1 where there is no signal."""
    if not isinstance(alpha, Tensor):
        return alpha or 1.0
    alpha = alpha.to(x).reshape(-1, *(1,) * (x.ndim - 1))
    return alpha.where(alpha != 0, 1.0)


__all__ = ["Prior", "ProximalConfig", "ProximalNetwork"]
