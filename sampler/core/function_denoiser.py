"""A denoiser that is a function, for research without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sampler.core.denoisers import BatchedDenoiser
from sampler.types import KINDS, Level, Prediction


class FunctionDenoiser(BatchedDenoiser):
    """Denoiser over plain functions fn(x, level, cond) -> tensor; see `denoiser`."""

    def __init__(self, fns: dict[str, Callable[..., Tensor]], prediction: str) -> None:
        self.fns = fns
        self.prediction = prediction
        self.models = tuple(fns)

    def forward(self, x: Tensor, level: Level, cond: Any, model: str) -> Tensor:
        return self.fns[model](x, level, cond)

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        return Prediction.of(self.prediction, x, out, level)


def denoiser(
    fn: Callable[..., Tensor],
    prediction: str = "eps",
    models: Mapping[str, Callable[..., Tensor]] | None = None,
) -> FunctionDenoiser:
    """Build a denoiser from `fn(x, level, cond) -> tensor`, for research without a pipeline.

    x [R, ...] holds the rows of all branches of a step, cond their concatenated conditions
    (tensors along dim 0; None where every branch has None). `prediction`: what fn returns, one of
    "eps", "v", "x0", "velocity". `models`: further networks by name, such as {"weak": fn}.

    Raises ValueError for an unknown prediction type.
    """
    if prediction not in KINDS:
        raise ValueError(f"Unknown prediction type {prediction!r}; one of {', '.join(KINDS)}.")
    return FunctionDenoiser({"main": fn, **(models or {})}, prediction)
