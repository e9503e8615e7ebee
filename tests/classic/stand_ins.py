"""Stand-ins for packages that some classes of diffusers use without asking for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


def _resized(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode=interpolation)


FTFY = SimpleNamespace(fix_text=lambda text: text)  # nothing to mend in the texts of the tests
TRANSFORMS = SimpleNamespace(
    functional=SimpleNamespace(resize=_resized),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)
COSMOS = ("transformer_cosmos", "controlnet_cosmos")


@contextmanager
def stand_ins(cls: type) -> Iterator[None]:
    """Inside, ftfy and torchvision's resize exist for a pipeline class."""
    own = {one.__module__: sys.modules[one.__module__] for one in cls.__mro__[:-1]}
    places: list[tuple[Any, str, Any]] = [
        (module, "ftfy", FTFY) for name, module in own.items() if "pipeline_" in name
    ]
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2] in COSMOS:
            places.append((module, "transforms", TRANSFORMS))
    missing = [(module, name, value) for module, name, value in places if not hasattr(module, name)]
    for module, name, value in missing:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, _ in missing:
            delattr(module, name)
