"""What goes into the network call of a stock pipeline and comes out of it, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

OFF = "Inside sampler.guide the pipeline's own guidance must be on, with any value: call it with"


def refuse(pipe: Any, kwargs: Mapping[str, Any], both: Tensor) -> None:
    """Raises ValueError for a call in which the two halves are not all that there is."""
    if kwargs.get("skip_layers") is not None or getattr(pipe, "skip_guidance_layers", None):
        raise ValueError(
            "sampler.guide cannot serve skip-layer guidance, which uses the conditional half again."
        )
    if getattr(pipe, "guidance_rescale", 0.0):
        raise ValueError(
            "Inside sampler.guide set rescale in the rule, not guidance_rescale in the call."
        )
    half = both.shape[0] // 2
    if getattr(pipe, "_cfg_normalization", False) or getattr(pipe, "_cfg_truncation", 1.0) != 1.0:
        raise ValueError(
            "Inside sampler.guide set norms and windows in the rule, not cfg_normalization or "
            "cfg_truncation in the call."
        )
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:  # DiT and PixArt do not tell: with guidance both halves are the same sample
        guided = both.shape[0] % 2 == 0 and torch.equal(both[:half], both[half:])
    if not guided or both.shape[0] % 2:
        raise ValueError(OFF + " guidance_scale > 1.")


def inputs(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """(sample, timestep) of a network call."""
    sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep  # pyright: ignore[reportReturnType]


def tensor_of(raw: Any) -> Tensor:
    """The network's answer as one tensor, whatever it came wrapped in."""
    value = raw[0] if isinstance(raw, tuple) else raw.sample
    return torch.stack(value) if isinstance(value, list) else value


def wrapped(value: Tensor, raw: Any) -> Any:
    """The value in the form in which the network answers.

    Where it was not called (None) the form serves callers that read `.sample` and `[0]` alike.
    """
    if isinstance(raw, tuple):
        return (value,)
    return (Transformer2DModelOutput if raw is None else type(raw))(sample=value)


def index_of(rows: Tensor | None, batch: int) -> Tensor:
    """The numbers of the rows that a rule asks for, on the CPU."""
    return torch.arange(batch) if rows is None else rows.nonzero()[:, 0]


def filled(out: Tensor, rows: Tensor, batch: int, cond: Tensor | None) -> Tensor:
    """An output for some rows as [B, ...]; the others are those of `cond`, or 0 without it."""
    if len(rows) == batch:
        return out
    base = out.new_zeros((batch, *out.shape[1:])) if cond is None else cond
    return base.index_copy(0, rows.to(out.device), out)


def position_of(times: Tensor, told: float) -> int:
    """The position of a timestep; half-precision networks are told a rounded one."""
    return int((times.double().cpu() - told).abs().argmin())
