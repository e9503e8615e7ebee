"""Inputs of a pipeline's call as controls of the form; independent of gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sampler.core.image_files import DEFAULT_STRENGTH
from sampler.engine import Engine
from sampler.models.ip_adapter import has_ip_adapter
from sampler.pipelines.call_arguments import arguments, default_of, reserved, takes_images
from sampler.pipelines.serving import image_inputs, serving_class
from sampler.ui.export import as_number
from sampler.ui.fields import Control, form_of

# Arguments that are no settings: tensors, functions, and what only changes the output's type.
_OTHER = ("embeds", "callback", "latents", "attention_mask", "tensor_inputs", "attention_kwargs")


@dataclass(frozen=True)
class Takes:
    """Controls that the form shows.

    prompt: texts, numbers of classes, or nothing; images: {name: needed by every call}; strength:
    the default of a start from an image, None where there is none; settings: further arguments.
    """

    name: str
    prompt: Literal["text", "class", ""] = "text"
    negative: bool = True
    size: bool = True
    images: Mapping[str, bool] = field(default_factory=dict[str, bool])
    strength: float | None = None
    settings: tuple[Control, ...] = ()

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call among the values of the controls: images and what was changed."""
        found = {name: values[name] for name in self.images if values.get(name) is not None}
        if self.strength is not None and "image" in found:
            found["strength"] = values["strength"]
        for control in self.settings:
            value = values.get(control.name)
            value = as_number(value) if control.form in ("number", "integer") else value
            if value not in (None, "", control.shown):
                found[control.name] = value
        return found


def takes_of(engine: Engine) -> Takes:
    """Inputs of an engine's pipeline; without a stock call, no images and no settings."""
    pipe: Any = engine.pipeline.pipe
    cls, known = type(pipe), arguments(type(pipe))
    prompt = "text" if "prompt" in known else ""
    prompt = "class" if engine.pipeline.takes_classes else prompt
    negative = "negative_prompt" in known if engine.hosted else prompt == "text"
    size = not engine.hosted or "height" in known
    if not (engine.hosted or engine.host is not None):
        return Takes(cls.__name__, prompt, negative, size)
    images = image_inputs(cls)
    if has_ip_adapter(pipe):
        images = {"ip_adapter_image": True, **images}
    settings = tuple(_settings(cls))
    return Takes(cls.__name__, prompt, negative, size, images, _strength(cls, images), settings)


def _strength(cls: type, images: Mapping[str, bool]) -> float | None:
    if "image" not in images:
        return None
    serving = serving_class(cls, {"image", *(name for name, needed in images.items() if needed)})
    if "strength" not in arguments(serving):
        return None
    return default_of(cls, "strength") if serving is cls else DEFAULT_STRENGTH


def _settings(cls: type) -> list[Control]:
    """Numbers, switches and texts among the arguments of a call."""
    found: list[Control] = []
    for name, parameter in arguments(cls).items():
        if name in reserved(cls) or name == "strength" or takes_images(name):
            continue
        if any(part in name for part in _OTHER):
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        if name.startswith(("prompt_", "negative_prompt_")):
            found.append(Control(name, "text", optional=True))
        elif isinstance(default, (bool, int, float)):
            form = "flag" if isinstance(default, bool) else "number"
            found.append(Control(name, form, default))
        elif default is None and (form := form_of(parameter.annotation)[0]) in (
            "integer",
            "number",
        ):
            found.append(Control(name, form, optional=True))
    return found
