"""Stand-ins for packages that some classes of diffusers use without asking for them, and for sizes.

Pipelines that edit images enlarge them to a megapixel; inside, to 32 x 32 pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


def _resized(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode=interpolation)


FTFY = SimpleNamespace(fix_text=lambda text: text)  # nothing to mend in the texts of the tests
TRANSFORMS = SimpleNamespace(
    functional=SimpleNamespace(resize=_resized),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)
COSMOS = ("transformer_cosmos", "controlnet_cosmos")
SIZES = "calculate_dimensions"  # of an area and a ratio of sides
AREA = 32 * 32


@contextmanager
def stand_ins(cls: type) -> Iterator[None]:
    """Inside, a pipeline class has ftfy and torchvision's resize, and its images are small."""
    own = {one.__module__: sys.modules[one.__module__] for one in cls.__mro__[:-1]}
    places: list[tuple[Any, str, Any]] = [
        (module, "ftfy", FTFY) for name, module in own.items() if "pipeline_" in name
    ]
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2] in COSMOS:
            places.append((module, "transforms", TRANSFORMS))
    places = [(module, name, value) for module, name, value in places if not hasattr(module, name)]
    for module in own.values():
        if sized := getattr(module, SIZES, None):
            places.append((module, SIZES, partial(_sized, sized)))
    with ExitStack() as stack:
        for module, name, value in places:
            stack.enter_context(patch.object(module, name, value, create=True))
        yield


def _sized(sized: Any, _: float, ratio: float) -> Any:
    return sized(AREA, ratio)
