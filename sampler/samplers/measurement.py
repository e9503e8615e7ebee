"""A measurement y and its operator, as RED-Diff needs them: start, gradient, sizes, ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sampler.core.adapter import PipelineAdapter

if TYPE_CHECKING:
    from torch import Tensor

Map = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """y [B or 1, ...]; forward: x in [-1, 1] -> A(x); init: where to start [B or 1, ...].

    decoded: whether `forward` decodes latents first.
    """

    forward: Map
    y: Tensor
    init: Tensor
    decoded: bool = False

    @property
    def size(self) -> int:
        """Elements of y in a row."""
        return math.prod(self.y.shape[1:])

    def start(self, x: Tensor) -> Tensor:
        """init for the rows of x [B, ...]. Raises ValueError where the two do not fit."""
        if self.init.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"reddiff: the start has shape {tuple(self.init.shape[1:])}, the model's x "
                f"{tuple(x.shape[1:])}; for images and a latent model say space='image'."
            )
        for name, value in (("y", self.y), ("the start", self.init)):
            if len(value) not in (1, len(x)):
                raise ValueError(
                    f"reddiff: {name} has {len(value)} rows for a batch of {len(x)}; "
                    "give one row, or one per image of the batch."
                )
        return self.init.to(x).expand(x.shape).contiguous()

    def gradient(self, x0: Tensor) -> Tensor:
        """d/dx0 of ‖y − A(x0)‖²/2 per row [B, ...]; no graph is kept."""
        import torch

        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            gap = self.forward(leaf) - self.y.to(x0)
            if not gap.requires_grad:
                raise ValueError("reddiff: the operator is not differentiable; A(x) has no graph.")
            return torch.autograd.grad(0.5 * (gap * gap).sum(), leaf)[0]

    def through(self, adapter: PipelineAdapter, size: tuple[int, int]) -> Measurement:
        """The same for the latents of a pipeline: A ∘ decode, started from the encoded start.

        Raises ValueError where the image has not the size of the run, and for videos.
        """
        if adapter.frames is not None:
            raise ValueError("reddiff: it measures images, and this pipeline generates videos.")
        if tuple(self.init.shape[-2:]) != size:
            height, width = self.init.shape[-2:]
            raise ValueError(
                f"reddiff: the image is {width} x {height}, the run {size[1]} x {size[0]}; "
                f"give width={width}, height={height}."
            )

        def forward(z: Tensor) -> Any:
            return self.forward(adapter.decode(z) * 2 - 1)

        latents = adapter.latents_of((self.init / 2 + 0.5).clamp(0, 1))
        return replace(
            self,
            forward=forward,
            init=latents,
            decoded=True,
        )


def measurement(operator: Any, y: Any, init: Any, data_range: Any) -> Measurement:
    """From what a user gives: see `REDDiff` for the forms.

    Raises ValueError for an operator without A or without a start, and where A(start) has not the
    shape of y.
    """
    import torch

    from sampler.samplers import operators

    if isinstance(y, str):
        from sampler.core.images import read

        y = read(y) * 2 - 1
    if not isinstance(y, torch.Tensor):
        raise ValueError("reddiff: y must be a tensor [B or 1, ...] or the path of an image.")
    if isinstance(operator, torch.Tensor):
        if init is None:
            raise ValueError("reddiff: give init with a matrix, or use operators.Matrix.")
        operator = operators.Matrix(operator, tuple(init.shape[1:]))
    operator = operators.build(operator)
    low, high = data_range or ((0.0, 1.0) if _is_deepinv(operator) else (-1.0, 1.0))
    gain, shift = (high - low) / 2, (high + low) / 2
    apply: Any = getattr(operator, "A", operator)
    if not callable(apply):
        raise ValueError(f"reddiff: operator {operator!r:.60} has no method A and is no function.")

    def forward(x: Tensor) -> Any:
        return apply(x if gain == 1 and shift == 0 else x * gain + shift)

    if init is None:
        pseudo_inverse: Any = getattr(operator, "A_dagger", None)
        if pseudo_inverse is None:
            raise ValueError("reddiff: this operator has no A_dagger(y); give init, the start.")
        init = (pseudo_inverse(y) - shift) / gain
    with torch.no_grad():
        seen = forward(init)
    if seen.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"reddiff: the operator maps the start {tuple(init.shape[1:])} to "
            f"{tuple(seen.shape[1:])}, but y is {tuple(y.shape[1:])}; one of them is another's."
        )
    return Measurement(forward, y.detach(), init.detach())


def _is_deepinv(operator: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "deepinv" for cls in type(operator).__mro__)
