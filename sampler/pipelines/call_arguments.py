"""Arguments of a stock pipeline's call: which ones may be given as inputs, checked by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from sampler import registry

# Arguments that a hosted engine sets itself, and what to give instead.
RESERVED: Mapping[str, str] = {
    "prompt": "the prompts",
    "negative_prompt": "negative",
    "class_labels": "the prompts",
    "num_inference_steps": "steps",
    "generator": "seeds",
    "latents": "seeds",
    "guidance_scale": "the scale of the guidance rule",
    "true_cfg_scale": "the scale of the guidance rule",
    "max_guidance_scale": "the scale of the guidance rule",
    "guidance_schedule": "the scale of the guidance rule",
    "guidance_rescale": "the field rescale of the guidance rule",
    "output_type": "output",
    "return_dict": "output",
    "num_images_per_prompt": "n",
    "num_videos_per_prompt": "n",
    "height": "height",
    "width": "width",
    "eta": "the field eta of the sampler",
    "timesteps": "steps",
    "sigmas": "steps",
    "callback_on_step_end": "progress",
    "callback": "progress",
}


def class_named(name: str) -> type | None:
    """Pipeline class of the installed diffusers, None for another name."""
    import diffusers

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) else None


@functools.cache
def arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    """Named parameters of a pipeline class's call, without self."""
    found = inspect.signature(cls.__call__).parameters.values()
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name != "self"}  # fmt: skip


@functools.cache
def parts(cls: type) -> frozenset[str]:
    """Names of the parts that a pipeline class is built of."""
    return frozenset(inspect.signature(cls.__init__).parameters)


@functools.cache
def guided_stage(cls: type) -> str | None:
    """Network that alone is sampled and guided where the call has stages with scales of their own.

    It is the last one whose scale the call takes, the `decoder` of `decoder_guidance_scale`; None
    for a call with one `guidance_scale`.
    """
    known, end = arguments(cls), "_guidance_scale"
    if "guidance_scale" in known:
        return None
    found = [name.removesuffix(end) for name in known if name.endswith(end)]
    return next((stage for stage in reversed(found) if stage in parts(cls)), None)


def _of_stage(cls: type, name: str, known: Iterable[str]) -> str:
    """`name`, or that with the guided stage before it where only that is known."""
    own = f"{guided_stage(cls)}_{name}"
    return own if name not in known and own in known else name


@functools.cache
def scheduler_name(cls: type) -> str:
    """Name of the scheduler whose steps are sampled and guided."""
    return _of_stage(cls, "scheduler", parts(cls))


def scheduler_of(pipe: Any) -> Any:
    """The scheduler of that name of a pipeline, None without one."""
    return getattr(pipe, scheduler_name(type(pipe)), None)


def steps_name(cls: type) -> str:
    """Name of the argument for the number of its steps."""
    return _of_stage(cls, "num_inference_steps", arguments(cls))


def scale_name(cls: type) -> str:
    """Name of the argument for the scale of its classifier-free guidance."""
    return _of_stage(cls, "guidance_scale", arguments(cls))


def reserved(cls: type) -> dict[str, str]:
    """`RESERVED` with the names that the call of a class has for them."""
    steps, scale = RESERVED["num_inference_steps"], RESERVED["guidance_scale"]
    return {**RESERVED, steps_name(cls): steps, scale_name(cls): scale}


def embeds_scale(cls: type) -> bool:
    """Return True if guidance_scale is an input of the network, beside or instead of CFG."""
    known = arguments(cls)
    prompted = any("prompt" in name for name in known)
    negative = any(name.startswith("neg") or name == "guidance_schedule" for name in known)
    return "guidance_scale" in known and ("true_cfg_scale" in known or (prompted and not negative))


def check_names(cls: type, names: Iterable[str]) -> None:
    """Raise ValueError for names that are no inputs of a pipeline class."""
    known, own = arguments(cls), reserved(cls)
    for name in names:
        if name in known and name in own and not (name == "guidance_scale" and embeds_scale(cls)):
            raise ValueError(f"inputs: {name!r} is set by the engine; give {own[name]} instead.")
        if name not in known:
            others = [one for one in known if one not in own]
            hint = registry.suggestion(name, others) or f"; it has {', '.join(others) or 'none'}"
            raise ValueError(f"inputs: {cls.__name__} has no argument {name!r:.60}{hint}.")


def check_types(cls: type, given: Mapping[str, Any]) -> None:
    """Raise ValueError for inputs of another type than those of a pipeline class.

    Known are numbers and switches, by their defaults, and images, by their names. None is allowed
    where the annotation has it.
    """
    for name, value in given.items():
        known = arguments(cls).get(name)
        hint = "" if known is None else str(known.annotation)
        if value is None and ("None" in hint or "Optional" in hint):
            continue
        default = default_of(cls, name)
        values = value if isinstance(value, (list, tuple)) and value else [value]
        if isinstance(default, bool):
            wanted = "true or false"
            fits = all(isinstance(one, bool) for one in values)
        elif isinstance(default, (int, float)):
            wanted = "a number"
            fits = not any(one is None or isinstance(one, (str, Mapping)) for one in values)
        elif takes_images(name) and "size" not in name:
            wanted = "an image, a tensor, or the path of a file or folder"
            fits = not any(isinstance(one, (str, int, float)) for one in values)
        else:
            continue
        if not fits:
            raise ValueError(f"inputs: {name} = {value!r:.60} must be {wanted}.")


def takes_images(name: str) -> bool:
    """Return True for the name of an argument that takes images."""
    named = "image" in name or name in ("video", "mask")
    return named and not any(
        part in name
        for part in ("guid", "num_", "embed", "latent", "scale", "crf", "token", "grid", "render")
    )


def required(cls: type, given: Iterable[str]) -> list[str]:
    """Names of arguments without a default that are neither set by the engine nor given."""
    found = arguments(cls)
    return [
        n for n, p in found.items() if p.default is p.empty and n not in {*reserved(cls), *given}
    ]


def default_of(cls: type, name: str) -> Any:
    """Default of an argument, None where it has none."""
    found = arguments(cls).get(name)
    return None if found is None or found.default is found.empty else found.default
