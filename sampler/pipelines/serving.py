"""Pipeline classes over the components of another one: image to image, inpainting, ControlNet."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from sampler.core.errors import ModelError
from sampler.pipelines.call_arguments import arguments, check_names, takes_images

CONTROL = "control_image"


def serving_class(cls: type, names: Iterable[str]) -> type:
    """Return the class whose call takes inputs of these names over the components of `cls`.

    That is `cls`, or the class that diffusers' AutoPipelineForInpainting (with a mask_image) or
    AutoPipelineForImage2Image finds for it. Raises ValueError for names that neither takes, and for
    an image that its call needs and that is not among them.
    """
    names, found = set(own_names(cls, dict.fromkeys(names))), cls
    if not names <= set(arguments(cls)):
        other = _counterpart(cls, "mask_image" in names)
        found = other if other is not None and names <= set(arguments(other)) else cls
    check_names(found, names)
    if found is not cls or "Inpaint" in cls.__name__ or _takes_controlnet(cls):
        for name in ("image", "mask_image", CONTROL):
            if name in arguments(found) and name not in names:
                raise ValueError(f"{found.__name__} needs the input {name!r}: give it in inputs.")
    return found


def own_names(cls: type, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with the name that a ControlNet class gives to its control image.

    It is `control_image`, or `image` where the call starts from no other image.
    """
    renamed = CONTROL in inputs and "image" not in inputs and CONTROL not in arguments(cls)
    if not (renamed and _takes_controlnet(cls)):
        return dict(inputs)
    return {"image" if name == CONTROL else name: value for name, value in inputs.items()}


def sized_by(cls: type, names: Iterable[str]) -> str | None:
    """Name of the input whose image has the size of the result, None without one.

    It is the image of inpainting, and the control image of a ControlNet.
    """
    names = set(names)
    if "mask_image" in names:
        return "image"
    if not _takes_controlnet(cls):
        return None
    return next((name for name in (CONTROL, "image") if name in names), None)


def image_inputs(cls: type) -> dict[str, bool]:
    """The images that calls over the components of `cls` take: {name: needed by every call}.

    They are those of the class itself, and those of its classes for image to image and inpainting;
    the image that a ControlNet follows is `control_image`. Without image prompts.
    """
    own = {name: p.default is p.empty for name, p in arguments(cls).items() if takes_images(name)}
    controlled = _takes_controlnet(cls)
    if controlled and CONTROL not in own and "image" in own:
        own = {CONTROL: True, **{name: need for name, need in own.items() if name != "image"}}
    others = [_counterpart(cls, masked) for masked in (False, True)]
    for other in filter(None, others):
        own |= {n: False for n in ("image", "mask_image") if n in arguments(other) and n not in own}
    if "Inpaint" in cls.__name__:
        own |= {"image": True, "mask_image": True}  # `serving_class` asks for them
    return {n: need for n, need in own.items() if "ip_adapter" not in n}


def controlnet_class(cls: type, union: bool) -> type:
    """Return the class of diffusers that has a ControlNet beside the components of `cls`.

    union: for a ControlNetUnionModel. Raises ModelError where there is none.
    """
    ending = "-controlnet-union" if union else "-controlnet"
    for table in _tables():
        for name, one in table.items():
            if one is cls and f"{name}{ending}" in table:
                return table[f"{name}{ending}"]
    kind = "a union ControlNet" if union else "a ControlNet"
    raise ModelError(
        f"diffusers has no class of {cls.__name__} with {kind}; leave controlnet (--controlnet) "
        "out, or load another model."
    )


def with_class(pipe: Any, cls: type, **more: Any) -> Any:
    """Return a pipeline of another class over the components and the state of `pipe`.

    more: further components. Unlike `from_pipe`, it converts no component to another data type.
    """
    given = {**pipe.config, **pipe.components, **more}
    wanted = inspect.signature(cls).parameters
    made = cls(**{name: value for name, value in given.items() if name in wanted})
    vars(made).update((k, value) for k, value in vars(pipe).items() if k not in vars(made))
    return made


def check_ip_inputs(names: Iterable[str], loaded: bool) -> None:
    """Raise ValueError for an image prompt without an IP-Adapter, and for one without an image.

    loaded: the pipeline has an IP-Adapter.
    """
    asked = [name for name in names if name in ("ip_adapter_image", "ip_adapter_image_embeds")]
    if asked and not loaded:
        raise ValueError(
            f"The input {asked[0]!r} needs an IP-Adapter: load the model with ip_adapter "
            "(--ip-adapter)."
        )
    if loaded and not asked:
        raise ValueError(
            "The IP-Adapter needs an image: give the input 'ip_adapter_image' (--ip-image)."
        )


@cache
def _takes_controlnet(cls: type) -> bool:
    return "controlnet" in inspect.signature(cls).parameters


def _counterpart(cls: type, masked: bool) -> type | None:
    """Class of the same family in diffusers' table of inpainting or image to image, if any."""
    _, target, inpainting = tables = [*_tables()]
    target = inpainting if masked else target
    families = (name for table in tables for name, one in table.items() if one is cls)
    return next((target[name] for name in families if name in target), None)


def _tables() -> Iterator[Mapping[str, type]]:
    """Yield diffusers' classes by family: text to image, image to image, inpainting."""
    from diffusers.pipelines import auto_pipeline

    for task in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        yield getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING")
