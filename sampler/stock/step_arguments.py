"""Checks of what a pipeline asks of a drop-in scheduler beside a step: arguments and parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sampler.core.errors import ModelError

# Arguments of the steps of Euler and Heun schedulers, with the values that change nothing.
_NEUTRAL = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
# Schedulers that a drop-in cannot replace, and why.
BESIDE_STEPS = {
    "RePaintScheduler": "RePaintPipeline goes back to noisier levels between its steps, and a "
    "sampler only goes down",
}
# Used by the drop-in, or checked against its grid: those of UnCLIP's pipelines, of
# LTXConditionPipeline and of Cosmos.
_USED = {
    "prev_timestep": "UnCLIPScheduler",
    "per_token_timesteps": "FlowMatchEulerDiscreteScheduler",
    "pred_original_sample": "EDMEulerScheduler",
}


class AbsentError(ModelError, AttributeError):
    """A part of the replaced scheduler that a pipeline computes with and the drop-in lacks."""


class StepAnswer(tuple[Tensor]):
    """The one value that a step of the drop-in answers with."""

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except IndexError:
            raise ValueError(
                "This pipeline reads a second answer of its scheduler's step, which a drop-in does "
                "not have; keep the scheduler that the pipeline came with."
            ) from None


def absent(name: str) -> AbsentError:
    """The error for a missing attribute."""
    return AbsentError(
        f"The drop-in scheduler has no {name!r}, which this pipeline computes with beside its "
        "steps; keep the scheduler that the pipeline came with."
    )


def refuse(
    base: Mapping[str, Any],
    method: str,
    eta: float,
    recomputed: bool | None,
    others: Mapping[str, Any],
) -> None:
    """Raise ValueError for arguments of `step` that change it, by name.

    base: the configuration of the replaced scheduler; method: name of the sampler; others: the
    arguments of the replaced scheduler's own `step`.
    """
    if eta or recomputed:
        raise ValueError(
            "eta is a setting of the sampler here: "
            "sampler.scheduler({'name': 'ddim', 'eta': 1}, pipe.scheduler)."
        )
    for name, value in others.items():
        neutral = name in _NEUTRAL and value == _NEUTRAL[name]
        used = _USED.get(name) == base.get("_class_name")
        if value is not None and not neutral and not used:
            raise ValueError(
                f"{name} is an argument of {base.get('_class_name')}.step that "
                f"{method} has no place for; keep the scheduler that the pipeline "
                "came with."
            )


def without_variance(model_output: Tensor, x: Tensor, base: Mapping[str, Any]) -> Tensor:
    """The model output with the channels of x [B, C, ...]: without a learned variance.

    Raises ValueError for another shape.
    """
    channels = x.shape[1]
    if model_output.shape == x.shape or x.ndim < 2:
        return model_output
    learned = str(base.get("variance_type", "")).startswith("learned")
    if model_output.shape[1] == 2 * channels and learned:
        return model_output[:, :channels]
    raise ValueError(
        f"The model output has shape {tuple(model_output.shape)} and the sample "
        f"{tuple(x.shape)}; they must be equal, or hold a learned variance of the scheduler."
    )


def common(timestep: Any) -> Any:
    """The timestep of a batch. Raises ValueError for samples at different ones."""
    if not isinstance(timestep, Tensor) or timestep.numel() == 1:
        return timestep
    first = timestep.flatten()[0]
    if bool((timestep != first).any()):
        raise ValueError(
            "The samples of this batch are at different timesteps, and a drop-in scheduler takes "
            "one step for all; keep the scheduler that the pipeline came with."
        )
    return first


def is_integer_part(timestep: Any, t: float) -> bool:
    """Return True for an integer tensor with the integer part of a time (of SkyReels-V2)."""
    whole = isinstance(timestep, Tensor) and not timestep.is_floating_point()
    return whole and int(timestep.flatten()[0]) == int(t)


def moving_tokens(times: Tensor, timestep: float, x: Tensor, stateful: bool) -> Tensor:
    """Tokens [B, T, 1] of x [B, T, C] that a step at `timestep` moves: those at that time.

    times [B, T]: of every token; those at an earlier one are conditions and stay. Raises ValueError
    for another shape, and for conditions at a time above 0 where the sampler has a state, since
    their history would be of another level.
    """
    if times.shape != x.shape[:2]:
        raise ValueError(f"per_token_timesteps has shape {tuple(times.shape)}, not [B, tokens].")
    moving = (times - timestep).abs() <= 1e-3
    if stateful and bool(((times > 0) & ~moving).any()):
        raise ValueError(
            "A condition with a strength below 1 is denoised from a level of its own, which only "
            "'ddim' serves; use strength 1, or sampler 'ddim'."
        )
    return moving[..., None]
