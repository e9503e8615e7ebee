"""Inputs and outputs of a stock pipeline's network call, and the calls that are not supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from sampler_kernels import map_tree
from torch import Tensor

GUIDANCE_OFF_HINT = (
    "Inside sampler.guide the pipeline's own guidance must be on, with any value: call it with"
)


def refuse(pipe: Any, kwargs: Mapping[str, Any], both: Tensor) -> None:
    """Raise ValueError for a call with more than a conditional and an unconditional half."""
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
    if guided is None:  # DiT, PixArt: with guidance both halves hold the same sample
        guided = both.shape[0] % 2 == 0 and torch.equal(both[:half], both[half:])
    if not guided or both.shape[0] % 2:
        raise ValueError(GUIDANCE_OFF_HINT + " guidance_scale > 1.")


def inputs(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return (sample, timestep) of a network call."""
    sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep  # pyright: ignore[reportReturnType]


def tensor_of(raw: Any) -> Tensor:
    """Unwrap the network's output to one tensor."""
    value = raw[0] if isinstance(raw, tuple) else raw.sample
    return torch.stack(value) if isinstance(value, list) else value


def wrapped(value: Tensor, raw: Any) -> Any:
    """Wrap a value as the network wraps its output.

    Where it was not called (None) the wrapper has both `.sample` and `[0]`.
    """
    if isinstance(raw, tuple):
        return (value,)
    return (Transformer2DModelOutput if raw is None else type(raw))(sample=value)


def call_on_rows(
    call: Callable[..., Any], rows: Tensor, batch: int, args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Call the network on some rows of its batch; other arguments are passed unchanged."""
    if len(rows) == batch:
        return call(*args, **kwargs)

    def cut(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
        return leaf[rows.to(leaf.device)] if batched else leaf

    def part(value: Any) -> Any:
        if isinstance(value, list) and len(value) == batch:  # a list of samples
            return [value[row] for row in rows.tolist()]
        return map_tree(cut, value)

    return call(*map(part, args), **{name: part(value) for name, value in kwargs.items()})


def index_of(rows: Tensor | None, batch: int) -> Tensor:
    """Indices of the rows that a rule evaluates, on the CPU."""
    return torch.arange(batch) if rows is None else rows.nonzero()[:, 0]


def filled(out: Tensor, rows: Tensor, batch: int, cond: Tensor | None) -> Tensor:
    """Expand an output for some rows to [B, ...]; the others are those of `cond`, or 0."""
    if len(rows) == batch:
        return out
    base = out.new_zeros((batch, *out.shape[1:])) if cond is None else cond
    return base.index_copy(0, rows.to(out.device), out)


def position_of(times: Tensor, timestep: float) -> int:
    """Position of a timestep; half-precision networks receive a rounded one."""
    return int((times.double().cpu() - timestep).abs().argmin())
