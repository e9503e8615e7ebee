"""A measurement y and its operator, as inverse solvers need them: start, gradient, range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import DocInfo, Predicate

from sampler.core.adapter import PipelineAdapter

if TYPE_CHECKING:
    from torch import Tensor

Map = Callable[["Tensor"], "Tensor"]


def _ascends(pair: tuple[float, float]) -> bool:
    return pair[0] < pair[1]


Range = Annotated[tuple[float, float], Predicate(_ascends), DocInfo("(low, high), low < high")]


MIN_ALPHA = 0.05
"""Signal below which an estimate of x0 is the mean of all data, where A has no useful Jacobian."""


def posterior_variance(v: float, alpha: Any, sigma: Any) -> Any:
    """r² = v·sigma²/(v·alpha² + sigma²): the variance of x0 given x, for data of variance v."""
    return v * sigma * sigma / (v * alpha * alpha + sigma * sigma)


@dataclass(frozen=True, eq=False)
class Measurement:
    """y [B or 1, ...]; forward: x in [-1, 1] -> A(x); init: where to start [B or 1, ...].

    decoded: whether `forward` decodes latents first. gain: units of y per unit of x in [-1, 1], so
    that noise given for [-1, 1] is gain·noise in y. name: of the strategy, for errors.
    """

    forward: Map
    y: Tensor
    init: Tensor | None
    decoded: bool = False
    gain: float = 1.0
    name: str = "reddiff"

    @property
    def size(self) -> int:
        """Elements of y in a row."""
        return math.prod(self.y.shape[1:])

    def start(self, x: Tensor) -> Tensor:
        """init for the rows of x [B, ...]. Raises ValueError where the two do not fit."""
        assert self.init is not None
        if self.init.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"{self.name}: the start has shape {tuple(self.init.shape[1:])}, the model's x "
                f"{tuple(x.shape[1:])}; for images and a latent model set space='image'."
            )
        for name, value in (("y", self.y), ("the start", self.init)):
            self._check_rows(name, value, len(x))
        return self.init.to(x).expand(x.shape).contiguous()

    def rows(self, x: Tensor) -> Tensor:
        """y [B or 1, ...] for the rows of x, typed as x. Raises ValueError for another B."""
        self._check_rows("y", self.y, len(x))
        return self.y.to(x)

    def check(self, seen: Tensor, x: Tensor) -> None:
        """Raise ValueError where A(x), `seen`, has not the shape of y."""
        if seen.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"{self.name}: the operator maps x {tuple(x.shape[1:])} to {tuple(seen.shape[1:])},"
                f" but y is {tuple(self.y.shape[1:])}; give the y of this operator and size."
            )

    def _check_rows(self, name: str, value: Tensor, count: int) -> None:
        if len(value) not in (1, count):
            raise ValueError(
                f"{self.name}: {name} has {len(value)} rows for a batch of {count}; "
                "give one row, or one per image of the batch."
            )

    def gradient(self, x0: Tensor) -> Tensor:
        """d/dx0 of ‖y − A(x0)‖²/2 per row [B, ...]; no graph is kept."""
        import torch

        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            gap = self.forward(leaf) - self.y.to(x0)
            if not gap.requires_grad:
                raise ValueError(
                    f"{self.name}: the operator is not differentiable; A(x) has no graph."
                )
            return torch.autograd.grad(0.5 * (gap * gap).sum(), leaf)[0]

    def through(self, adapter: PipelineAdapter, size: tuple[int, int]) -> Measurement:
        """The same for the latents of a pipeline: A ∘ decode, started from the encoded start.

        Raises ValueError where the image has not the size of the run, and for videos.
        """
        import torch

        if adapter.frames is not None:
            raise ValueError(
                f"{self.name}: it measures images, and this pipeline generates videos."
            )

        def forward(z: Tensor) -> Any:
            return self.forward(adapter.decode(z) * 2 - 1)

        if self.init is None:
            image = torch.zeros(1, 3, *size)
            with torch.enable_grad():
                seen = self.forward(image.requires_grad_())
            self.check(seen, image)
            if not seen.requires_grad:
                raise ValueError(
                    f"{self.name}: the operator is not differentiable; A(x) has no graph."
                )
            return replace(self, forward=forward, decoded=True)
        if tuple(self.init.shape[-2:]) != size:
            height, width = self.init.shape[-2:]
            raise ValueError(
                f"{self.name}: the image is {width} x {height}, the run {size[1]} x {size[0]}; "
                f"give width={width}, height={height}."
            )
        latents = adapter.latents_of((self.init / 2 + 0.5).clamp(0, 1))
        return replace(self, forward=forward, init=latents, decoded=True)


def measurement(
    operator: Any,
    y: Any,
    init: Any = None,
    data_range: Any = None,
    name: str = "reddiff",
    needs_start: bool = False,
) -> Measurement:
    """From what a user gives: see `REDDiff` for the forms.

    name: of the strategy, for errors. needs_start: whether a start is made of y where init is None.
    Raises ValueError for an operator without A or, where one is needed, without a start, and where
    A(start) has not the shape of y.
    """
    import torch

    from sampler.samplers import operators

    if isinstance(y, str):
        from sampler.core.images import read

        y = read(y) * 2 - 1
    if not isinstance(y, torch.Tensor):
        raise ValueError(f"{name}: y must be a tensor [B or 1, ...] or the path of an image.")
    if isinstance(operator, torch.Tensor):
        if init is None and needs_start:
            raise ValueError(f"{name}: give init with a matrix, or use operators.Matrix.")
        operator = (
            _of_matrix(operator)
            if init is None
            else operators.Matrix(operator, tuple(init.shape[1:]))
        )
    operator = operators.build(operator)
    low, high = data_range or ((0.0, 1.0) if _is_deepinv(operator) else (-1.0, 1.0))
    gain, shift = (high - low) / 2, (high + low) / 2
    apply: Any = getattr(operator, "A", operator)
    if not callable(apply):
        raise ValueError(
            f"{name}: operator {operator!r:.60} has no method A and is not a function."
        )

    def forward(x: Tensor) -> Any:
        return apply(x if gain == 1 and shift == 0 else x * gain + shift)

    if init is None and not needs_start:
        return Measurement(forward, y.detach(), None, gain=gain, name=name)
    if init is None:
        pseudo_inverse: Any = getattr(operator, "A_dagger", None)
        if pseudo_inverse is None:
            raise ValueError(f"{name}: this operator has no A_dagger(y); give init, the start.")
        init = (pseudo_inverse(y) - shift) / gain
    with torch.no_grad():
        seen = forward(init)
    if seen.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{name}: the operator maps the start {tuple(init.shape[1:])} to "
            f"{tuple(seen.shape[1:])}, but y is {tuple(y.shape[1:])}; one of them is another's."
        )
    return Measurement(forward, y.detach(), init.detach(), gain=gain, name=name)


def _of_matrix(matrix: Tensor) -> Map:
    return lambda x: x.flatten(1) @ matrix.to(x).T


def _is_deepinv(operator: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "deepinv" for cls in type(operator).__mro__)
