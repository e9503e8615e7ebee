"""Arguments of a stock pipeline's calls, and the settings that a rule cannot replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sampler_kernels import leaves, map_tree
from torch import Tensor

from sampler.stock.interception import signature_of

# Names under which denoising networks take the time.
TIME = frozenset(
    {"timestep", "timesteps", "timestep_ratio", "t", "r", "time", "sigma", "noise_labels"}
)
SAMPLE = ("hidden_states", "sample", "x", "latents")
_BY_ROW = ("diffusers.models.", "diffusers.loaders.")


def denoisers(pipe: Any) -> list[Any]:
    """Components of a pipeline that are called with a time."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [part for part in parts if TIME & set(_parameters(part))]


def _parameters(network: Any) -> Iterable[str]:
    inner = getattr(network, "_orig_mod", network)  # of torch.compile
    try:
        return signature_of(type(inner).forward).parameters
    except (TypeError, ValueError):
        return ()


def refuse_call(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of a pipeline call that use the branches in other ways."""
    if kwargs.get("skip_guidance_layers") is not None:
        raise ValueError(
            "sampler.guide cannot serve skip-layer guidance, which uses the conditional half again."
        )
    if kwargs.get("guess_mode"):
        raise ValueError(
            "sampler.guide cannot serve guess_mode, where only the conditional branch sees the "
            "ControlNet; call the pipeline without it."
        )


def refuse_settings(pipe: Any) -> None:
    """Raise ValueError for settings of a pipeline that rescale the guided output."""
    if getattr(pipe, "guidance_rescale", 0.0):
        raise ValueError(
            "Inside sampler.guide set rescale in the rule, not guidance_rescale in the call."
        )
    if getattr(pipe, "_cfg_normalization", False) or getattr(pipe, "_cfg_truncation", 1.0) != 1.0:
        raise ValueError(
            "Inside sampler.guide set norms and windows in the rule, not cfg_normalization or "
            "cfg_truncation in the call."
        )


def guidance_is_off(pipe: Any) -> bool:
    """Return True if a pipeline says that its guidance is off; many do not tell.

    One that was given a scale above 1 is asked by its calls: the flag of some is always False.
    """
    scale = getattr(pipe, "_guidance_scale", None)
    on = isinstance(scale, (int, float)) and scale > 1
    return not on and getattr(pipe, "do_classifier_free_guidance", None) is False


def couples_rows(network: Any) -> bool:
    """Return True if attention processors of a network may look at other rows of its batch.

    Those of perturbed attention and of pipelines split the batch into its branches; a processor
    that diffusers does not ship may do the same.
    """
    name = "processor"  # getattr takes microseconds where a module has no such attribute
    having = (
        module
        for module in network.modules()
        if name in vars(module) or name in module._modules or hasattr(type(module), name)
    )
    kinds = {type(found) for module in having if (found := module.processor) is not None}
    return any("PAG" in k.__name__ or not k.__module__.startswith(_BY_ROW) for k in kinds)


@contextmanager
def processors_kept(networks: Sequence[Any]) -> Iterator[None]:
    """Inside, where a call fails, attention layers get the processors back that they had before.

    Pipelines that exchange them for the time of a call do so only where it ends well.
    """
    layers = [layer for network in networks for layer in network.modules()]
    own = [(layer, layer.processor) for layer in layers if hasattr(layer, "processor")]
    try:
        yield
    except BaseException:
        for layer, processor in own:
            if layer.processor is not processor:
                layer.set_processor(processor)
        raise


def has_state(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return True if a call is given an object of a class, such as a cache of the whole batch."""
    plain = (Tensor, int, float, str, np.ndarray, np.generic, torch.dtype, torch.device, type(None))
    return any(not isinstance(leaf, plain) for leaf in leaves([*args, *kwargs.values()]))


def sample_of(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The noisy sample that a network is called on, a tensor or a list of tensors."""
    if args:
        return args[0]
    named = (kwargs[name] for name in SAMPLE if name in kwargs)
    tensors = (v for v in kwargs.values() if isinstance(v, Tensor) and v.ndim > 1)
    return next(named, None) if any(n in kwargs for n in SAMPLE) else next(tensors, None)


def call_on_rows(
    call: Callable[..., Any], rows: Tensor, batch: int, args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Call the network on some rows of its batch; other arguments are passed unchanged.

    Tensors that hold every frame of a video as a row are cut alike.
    """
    x = sample_of(args, kwargs)
    counts = {1, *(x.shape[1:3] if isinstance(x, Tensor) and x.ndim == 5 else ())}

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        count, rest = divmod(len(leaf), batch)
        if rest or count not in counts:
            return leaf
        chosen = rows.to(leaf.device)
        return leaf[chosen] if count == 1 else leaf.unflatten(0, (batch, -1))[chosen].flatten(0, 1)

    def part(value: Any) -> Any:
        if isinstance(value, list) and len(value) == batch:
            tensors = [one for one in value if isinstance(one, Tensor) and one.ndim]
            samples = isinstance(x, list) or any(len(one) % batch for one in tensors)
            scales = all(isinstance(one, (int, float)) for one in value)  # one per ControlNet
            if samples or not (tensors or scales):  # else of the whole batch, such as residuals
                return [value[row] for row in rows.tolist()]
        return map_tree(cut, value)

    return call(*map(part, args), **{name: part(value) for name, value in kwargs.items()})


def guidance_off(pipe: Any, rule: str) -> str:
    """The sentence for a call that evaluates one branch under a rule of two."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    switch = "guidance_scale > 1"
    if "true_cfg_scale" in parameters:
        switch = "a negative prompt and true_cfg_scale > 1"
    elif "max_guidance_scale" in parameters:
        switch = "max_guidance_scale > 1"
    return (
        f"This call of {type(pipe).__name__} evaluates one branch, and guidance "
        f"{rule!r} needs an unconditional one: inside sampler.guide the pipeline's "
        f"own guidance must be on, with any value: call it with {switch}; use 'none' where it "
        "has no unconditional branch."
    )


def names_of(pipe: Any, networks: Sequence[Any]) -> str:
    """Names of denoising networks among the components of a pipeline, for a sentence."""
    names = [n for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    own = [n for n in names if any(getattr(pipe, n) is one for one in networks)]
    return " or ".join(own or [n for n in names if n.startswith(("unet", "transformer"))])
