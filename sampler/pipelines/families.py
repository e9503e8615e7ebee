"""Registry of the pipeline families: class names of diffusers pipelines and their adapters.

A new family is one module with an `@adapter(...)` class, and an import in
`sampler/pipelines/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sampler.core.errors import ModelError

if TYPE_CHECKING:
    pass
from sampler.pipelines.base import Adapter

A = TypeVar("A", bound="type[Adapter]")
_families: dict[str, type[Adapter]] = {}


def adapter(*pipeline_classes: str) -> Callable[[A], A]:
    """Register an adapter class for diffusers pipelines of these class names."""

    def add(cls: A) -> A:
        for name in pipeline_classes:
            _families[name] = cls
        return cls

    return add


def supported() -> list[str]:
    """Names of the pipeline classes that can be loaded."""
    return sorted(_families)


def processes(name: str) -> tuple[str, ...]:
    """Forward processes that pipelines of a class are trained with."""
    return _families[name].processes if name in _families else Adapter.processes


def adapt(pipe: Any, weak: Any = None) -> Adapter:
    """Build the adapter of a diffusers pipeline; `weak`: a second network, for Autoguidance.

    Raises ModelError for an unsupported pipeline, and for a network that needs other inputs.
    """
    name = type(pipe).__name__
    if name not in _families:
        raise ModelError(
            f"{name} is not a supported pipeline; supported: {', '.join(supported())}."
        )
    return _families[name](pipe, weak)
