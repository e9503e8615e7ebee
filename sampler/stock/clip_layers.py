"""Text encoders as diffusers reads them where a call skips their last layers (`clip_skip`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sampler.pipelines.call_arguments import default_of


@contextmanager
def readable_layers(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """Make CLIP's last norm readable as `text_model.final_layer_norm` in a call with `clip_skip`.

    In transformers 5 a CLIPTextModel has no inner module `text_model`, but its layers; diffusers
    0.42 reads the former. The name is an attribute of the encoder for the time of a context, and
    not a module: state and structure stay as they are.
    """
    asked = given.get("clip_skip", default_of(type(pipe), "clip_skip")) is not None
    encoders = [part for part in pipe.components.values() if asked and _is_flat(part)]
    for encoder in encoders:
        vars(encoder)["text_model"] = encoder
    try:
        yield
    finally:
        for encoder in encoders:
            del vars(encoder)["text_model"]


def _is_flat(part: Any) -> bool:
    """Return True for a text encoder with its layers in itself."""
    parts = dict(part.named_children()) if isinstance(part, nn.Module) else {}
    return "final_layer_norm" in parts and "embeddings" in parts
