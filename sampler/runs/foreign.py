"""Settings in images of other programs: A1111's text (also Forge, SD.Next), ComfyUI's workflow.

A1111 and its kin write the chunk `parameters`: the prompt, "Negative prompt: ...", and a line of
"Name: value" pairs. ComfyUI writes the chunk `prompt`: its nodes as JSON, {id: {"class_type": ...,
"inputs": {name: value or [id of another node, output]}}}. Settings that are not supported are named
in `Foreign.unused`; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sampler.core.errors import UsageError
from sampler.runs.encodings import PARAMETERS

_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_USED = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size")
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Nodes whose settings are read, or that change no pixel of what is replayed.
_READ = (
    *_SAMPLERS, "KSamplerSelect", "BasicScheduler", "RandomNoise", "CFGGuider", "BasicGuider",
    "CLIPTextEncode", "VAEDecode", "SaveImage", "PreviewImage", "PrimitiveString",
    "PrimitiveStringMultiline", "EmptyLatentImage", "EmptySD3LatentImage",
)  # fmt: skip
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")  # in A1111's prompts
_FROM_IMAGE = UsageError(
    "The image was made from another one, which it does not hold; use `sampler generate "
    "--init-image`."
)
MOST_LINKS = 50  # of a chain of nodes


@dataclass(frozen=True)
class Foreign:
    """Settings of an image of another program; None for missing ones.

    sampler: name as written, with the grid of A1111's "Schedule type" behind it; grid: ComfyUI's
    scheduler; unused: names of fields and nodes without effect on a replay.
    """

    program: str
    prompt: str
    negative_prompt: str = ""
    sampler: str | None = None
    grid: str | None = None
    steps: int | None = None
    scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    unused: tuple[str, ...] = ()


def read_foreign(texts: Mapping[str, str]) -> Foreign | None:
    """Read the text chunks of an image; None where no other program's are among them.

    Raises UsageError for a workflow or a text that cannot be read.
    """
    if PARAMETERS in texts:
        return _web_ui(texts[PARAMETERS])
    if "prompt" in texts:
        return _comfy(texts["prompt"])
    if "workflow" in texts:
        raise UsageError(
            "The image holds the drawing of a ComfyUI workflow but not what was run (its chunk "
            "'prompt'); save it again with ComfyUI."
        )
    return None


def _web_ui(text: str) -> Foreign:
    *lines, last = text.strip().split("\n")
    pairs = {name: _unquoted(value) for name, value in _PAIR.findall(last)}
    if "Steps" not in pairs:
        raise UsageError("The image's text 'parameters' has no line 'Steps: ..., Sampler: ...'.")
    if "Denoising strength" in pairs and not any(name.startswith("Hires") for name in pairs):
        raise _FROM_IMAGE
    found = "\n".join(lines).partition("Negative prompt:")
    networks = _NETWORKS.findall(found[0])
    width, _, height = pairs.get("Size", "").partition("x")
    sampler = " ".join(pairs[k] for k in ("Sampler", "Schedule type") if k in pairs)
    return Foreign(
        "A1111",
        _NETWORKS.sub("", found[0]).strip(),
        found[2].strip(),
        sampler or None,
        steps=_number(int, pairs, "Steps"),
        scale=_number(float, pairs, "CFG scale"),
        seed=_number(int, pairs, "Seed"),
        width=_number(int, {"Size": width}, "Size") if width else None,
        height=_number(int, {"Size": height}, "Size") if width else None,
        unused=(*(name for name in pairs if name not in _USED), *networks),
    )


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


def _number(kind: Callable[[Any], Any], values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        return None
    try:
        return kind(values[name])
    except (TypeError, ValueError):
        raise UsageError(f"{name} = {values[name]!r:.60} in the image is not a number.") from None


@dataclass(frozen=True)
class _Nodes:
    """Nodes of a ComfyUI prompt by id."""

    nodes: Mapping[str, Mapping[str, Any]]

    def linked(self, node: Mapping[str, Any], *names: str) -> Mapping[str, Any] | None:
        """The node that one of these inputs leads to."""
        for name in names:
            value = node["inputs"].get(name)
            if isinstance(value, list) and value:
                return self.nodes.get(str(cast("list[Any]", value)[0]))
        return None

    def value(self, node: Mapping[str, Any] | None, *names: str) -> Any:
        """The first of these inputs that is there, through nodes that hold one value."""
        for _ in range(MOST_LINKS):
            if node is None:
                return None
            name = next((n for n in names if n in node["inputs"]), None)
            if name is None:
                return None
            if not isinstance(node["inputs"][name], list):
                return node["inputs"][name]
            node, names = self.linked(node, name), (*names, "value", "text", "string")
        return None

    def text(self, node: Mapping[str, Any], *names: str) -> str:
        """The text that a conditioning input leads to, through nodes that change a conditioning."""
        found = self.linked(node, *names)
        for _ in range(MOST_LINKS):
            if found is None or found["class_type"] == "ConditioningZeroOut":
                return ""
            text = self.value(found, "text", "prompt", "clip_l", "t5xxl")
            if isinstance(text, str):
                return text
            found = self.linked(found, "conditioning", "conditioning_1", *names)
        return ""

    def latent(self, node: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The node that makes the first latents."""
        return self.linked(node, "latent_image")


def _comfy(text: str) -> Foreign:
    graph = _Nodes(_parsed(text))
    samplers = [node for node in graph.nodes.values() if node["class_type"] in _SAMPLERS]
    if len(samplers) != 1:
        raise UsageError(
            f"The image's ComfyUI workflow has {len(samplers)} sampler nodes "
            f"({', '.join(_SAMPLERS)}), and only one can be replayed."
        )
    (node,) = samplers
    guider = graph.linked(node, "guider") or node
    choice, sigmas = graph.linked(node, "sampler") or node, graph.linked(node, "sigmas") or node
    latent = graph.latent(node)
    denoise = graph.value(sigmas, "denoise")
    if latent is not None and "pixels" in latent["inputs"] or denoise not in (None, 1, 1.0):
        raise _FROM_IMAGE
    noise = graph.linked(node, "noise") or node
    values = {
        "steps": graph.value(sigmas, "steps"),
        "cfg": graph.value(guider, "cfg"),
        "seed": graph.value(noise, "noise_seed", "seed"),
        "width": graph.value(latent, "width"),
        "height": graph.value(latent, "height"),
    }
    given = {name: value for name, value in values.items() if value is not None}
    return Foreign(
        "ComfyUI",
        graph.text(guider, "positive", "conditioning"),
        graph.text(guider, "negative"),
        graph.value(choice, "sampler_name"),
        graph.value(sigmas, "scheduler"),
        _number(int, given, "steps"),
        _number(float, given, "cfg"),
        _number(int, given, "seed"),
        _number(int, given, "width"),
        _number(int, given, "height"),
        tuple(sorted({n["class_type"] for n in graph.nodes.values()} - {*_READ})),
    )


def _parsed(text: str) -> dict[str, dict[str, Any]]:
    try:
        nodes = json.loads(text)
        checked = {str(key): node for key, node in nodes.items() if "class_type" in node}
        if all(isinstance(node["inputs"], dict) for node in checked.values()):
            return checked
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise UsageError("The image's ComfyUI workflow cannot be read.")


def fields_of(found: Foreign) -> Iterator[tuple[str, Any]]:
    """(name, value) of what the image says."""
    for name, value in vars(found).items():
        if value not in (None, "", ()):
            yield name, list(value) if isinstance(value, tuple) else value
